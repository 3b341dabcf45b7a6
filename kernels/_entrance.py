"""What happens between the call of an operation and its kernel: automatic casts, transforms.

Autocast sees the functions of PyTorch, not ours: what it would have cast is cast here, and it is
off inside. Of the transforms of torch.func those that need gradients go through an
autograd.Function, which operators of torch.library do not; forward mode is refused, as an operator
without a formula for it would return zeros.
"""

import functools
import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def entrance(
    narrowed: tuple[str, ...] = (), alike: tuple[str, ...] = (), forward_mode: bool = False
) -> Callable:
    """Decorate an operation: cast as autocast would, and refuse forward-mode derivatives.

    narrowed: tensors that autocast makes fp16 or bf16, as the factors of a product; a result of
    floating numbers that belongs to the first, if there are several, comes in its dtype.
    alike: tensors that become one dtype under autocast, the widest among them, as in a sum.
    forward_mode: whether forward-mode derivatives are left to the functions that the operation
    calls, which are right or refuse.
    Without autocast nothing is cast.
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
            wide = functools.reduce(torch.promote_types, [given[n].dtype for n in alike] or [dtype])
            for name in narrowed:
                given[name] = _cast(given[name], dtype)
            for name in alike:
                given[name] = _cast(given[name], wide)
            with torch.autocast(device, enabled=False):
                y = operation(**given)
            return y if result is None else y.to(result)

        # torch.compile limits how often one code object is compiled; each operation has its own.
        call.__code__ = call.__code__.replace(co_name=operation.__name__)
        return call

    return decorate


def refuse_forward_mode(name: str, tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError, with the name of the operation, if a tensor has a tangent."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            f"{name}: no forward-mode derivative (torch.func.jvp); use a backward pass or "
            "torch.func.grad"
        )


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; fp64, which autocast leaves alone, and integers as they are."""
    return x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)


def wants_gradient(x: Tensor) -> bool:
    """Whether a backward pass may ask for the gradient of x; inside torch.func x does not say."""
    transformed = torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() and (x.requires_grad or transformed)


def differentiable(operator: Callable, save: Callable, backward: Callable) -> Callable:
    """Give an operator of torch.library its backward pass, inside torch.func too.

    save, backward: as register_autograd takes them; `backward` calls operators through `last`.
    Returns what to call for the operator.
    """
    operator.register_autograd(backward, setup_context=save)
    return _transformable(operator, save, backward)


def last(operator: Callable) -> Callable:
    """What a backward pass calls for an operator that has no derivative itself.

    Outside of torch.func such an operator raises on its own when a derivative is asked of it.
    """

    def refuse(ctx, *gradients):
        name = operator._opoverload._schema.name.removesuffix("_bwd")
        raise RuntimeError(f"{name}: no second derivative")

    return _transformable(operator, lambda ctx, inputs, output: None, refuse)


def _transformable(operator: Callable, save: Callable, backward: Callable) -> Callable:
    """The operator; inside torch.func as an autograd.Function, which is what works there."""
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
