"""Make operations that call operators of torch.library work under autocast and torch.func.

Autocast knows only PyTorch's functions. So `entrance` casts what autocast would cast, and turns it
off inside. Transforms of torch.func that need gradients work with an autograd.Function, but not
with an operator of torch.library: `differentiable` makes both. Forward mode is refused, because an
operator without a formula for it would return zeros.
"""

import functools
import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def entrance(
    narrowed: tuple[str, ...] = (), one_dtype: tuple[str, ...] = (), forward_mode: bool = False
) -> Callable:
    """Return a decorator that casts as autocast would, and refuses forward-mode derivatives.

    Without autocast nothing is cast.

    narrowed: arguments that autocast makes fp16 or bf16, like the factors of a product. If there
        are several, the result has the dtype that the first one came in
    one_dtype: arguments that autocast makes one dtype, the widest among them, like the terms of a
        sum
    forward_mode: leave forward-mode derivatives to the functions that the operation calls, because
        those are right or refuse
    """

    def decorate(operation: Callable) -> Callable:
        signature = inspect.signature(operation)

        @functools.wraps(operation)
        def call(*args, **options):
            tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
            if not forward_mode:
                refuse_forward_mode(operation.__name__, tensors)
            device = tensors[0].device.type if tensors else "cpu"
            if not torch.is_autocast_enabled(device):
                return operation(*args, **options)
            given = signature.bind(*args, **options).arguments
            dtype = torch.get_autocast_dtype(device)
            result = given[narrowed[0]].dtype if len(narrowed) > 1 else None
            dtypes = [given[name].dtype for name in one_dtype] or [dtype]
            wide = functools.reduce(torch.promote_types, dtypes)
            for name in narrowed:
                given[name] = _cast(given[name], dtype)
            for name in one_dtype:
                given[name] = _cast(given[name], wide)
            with torch.autocast(device, enabled=False):
                y = operation(**given)
            return y if result is None else y.to(result)

        # torch.compile limits how often it compiles one code object, so each operation gets one.
        call.__code__ = call.__code__.replace(co_name=operation.__name__)
        return call

    return decorate


def refuse_forward_mode(name: str, tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError, naming the operation, if a tensor has a forward-mode tangent.

    name: name of the operation
    tensors: its arguments
    """
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            f"{name}: no forward-mode derivative (torch.func.jvp); use a backward pass or "
            "torch.func.grad"
        )


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`; leave fp64 and integers unchanged, as autocast does."""
    return x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)


def wants_gradient(x: Tensor) -> bool:
    """Return whether a backward pass may need x's gradient; inside torch.func it always may."""
    transformed = torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() and (x.requires_grad or transformed)


def differentiable(operator: Callable, save: Callable, backward: Callable) -> Callable:
    """Give an operator of torch.library its backward pass, inside torch.func too.

    operator: operator of torch.library
    save, backward: as for register_autograd; `backward` must call operators through `last`

    Returns a function to call instead of the operator.
    """
    operator.register_autograd(backward, setup_context=save)
    return _transformable(operator, save, backward)


def last(operator: Callable) -> Callable:
    """Return a function that a backward pass calls for an operator without a derivative.

    It raises RuntimeError where a second derivative is needed. Outside of torch.func the operator
    raises by itself.
    """

    def refuse(ctx, *gradients):
        name = operator._opoverload._schema.name.removesuffix("_bwd")
        raise RuntimeError(f"{name}: no second derivative")

    return _transformable(operator, lambda ctx, inputs, output: None, refuse)


def _transformable(operator: Callable, save: Callable, backward: Callable) -> Callable:
    """Return a function that calls the operator, inside torch.func as an autograd.Function."""
    methods = {
        "generate_vmap_rule": True,
        "forward": staticmethod(lambda *args: operator(*args)),
        "setup_context": staticmethod(save),
        "backward": staticmethod(backward),
    }
    transformed = type("Transformed", (torch.autograd.Function,), methods)

    def call(*args):
        inside = torch._C._are_functorch_transforms_active()
        return transformed.apply(*args) if inside else operator(*args)

    return call
