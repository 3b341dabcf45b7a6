"""Injections, which combine the embedded text e with the state s before each core iteration.

To add one, write a subclass of Injection, give it a row in INJECTIONS, and add its name to
INJECTIONS in config/model.py; a test compares the two.
Shapes: B batch, T time, C width of the residual stream.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config.model import ModelConfig
from minillm.model.linear import Linear, Matrix
from minillm.model.norms import make_norm, norm_parameters
from minillm.ops import Ops


class Injection(nn.Module):
    """Injection s + e. The style parcae normalises e first.

    config: shape of the model
    ops: table of operations
    Source: Geiping et al. 2025, arXiv:2502.05171, section 3.2.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.norm = make_norm(config, ops) if _has_norm(config) else None

    def prepare(self, e: Tensor) -> Tensor:
        """Return the part of e that every iteration adds, computed once a pass, (B, T, C)."""
        return e if self.norm is None else self.norm(e)

    def forward(self, s: Tensor, prepared: Tensor) -> Tensor:
        """Return the input of the core, (B, T, C).

        s: state, (B, T, C)
        prepared: result of `prepare`, (B, T, C)
        """
        return s + prepared


class ConcatInjection(Injection):
    """Injection A [s; e] = A_s s + A_e e, of which A_e e is computed once a pass.

    Source: Geiping et al. 2025, arXiv:2502.05171, section 3.2.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.state = Linear(config.d_model, config.d_model, bias=False)
        self.text = Linear(config.d_model, config.d_model, bias=False)

    def prepare(self, e: Tensor) -> Tensor:
        """Return A_e e, (B, T, C), for e, (B, T, C)."""
        return self.text(super().prepare(e))

    def forward(self, s: Tensor, prepared: Tensor) -> Tensor:
        """Return A_s s + prepared, (B, T, C).

        s, prepared: see Injection.forward
        """
        return self.state(s) + prepared


class DiagonalInjection(Injection):
    """Injection exp(-softplus(b) exp(a)) s + softplus(b) B e, a contraction in each channel.

    Source: Parcae, arXiv:2604.12946.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.text = Linear(config.d_model, config.d_model, bias=False)  # B
        self.rate = nn.Parameter(torch.zeros(config.d_model))  # a
        self.step = nn.Parameter(torch.zeros(config.d_model))  # b

    def prepare(self, e: Tensor) -> Tensor:
        """Return softplus(b) B e, (B, T, C), for e, (B, T, C)."""
        e = self.text(super().prepare(e))
        return e * F.softplus(self.step).to(e.dtype)

    def forward(self, s: Tensor, prepared: Tensor) -> Tensor:
        """Return the decayed state plus `prepared`, (B, T, C).

        s, prepared: see Injection.forward
        """
        # At least fp32, where a decay just below 1 stays below it; in bf16 0.999 would be 1.
        wide = torch.promote_types(s.dtype, torch.float32)
        decay = torch.exp(-F.softplus(self.step.to(wide)) * self.rate.to(wide).exp())
        return (decay * s + prepared).to(s.dtype)


def _has_norm(config: ModelConfig) -> bool:
    return config.recurrence_style == "parcae"


def _none(c: ModelConfig) -> dict[str, Matrix]:
    return {}


@dataclass(frozen=True)
class InjectionKind:
    """Row of INJECTIONS.

    build: makes the injection
    once: returns the weight matrices that are used once a pass, by parameter name
    each: returns those that are used in each iteration
    vectors: returns the number of other parameters used in each iteration
    """

    build: Callable[[ModelConfig, Ops], Injection]
    once: Callable[[ModelConfig], dict[str, Matrix]] = _none
    each: Callable[[ModelConfig], dict[str, Matrix]] = _none
    vectors: Callable[[ModelConfig], int] = lambda c: 0


INJECTIONS = {
    "concat": InjectionKind(
        ConcatInjection,
        once=lambda c: {"text.weight": Matrix((c.d_model,), c.d_model)},
        each=lambda c: {"state.weight": Matrix((c.d_model,), c.d_model)},
    ),
    "add": InjectionKind(Injection),
    "diagonal": InjectionKind(
        DiagonalInjection,
        once=lambda c: {"text.weight": Matrix((c.d_model,), c.d_model, identity=True)},
        vectors=lambda c: 2 * c.d_model,
    ),
}


def make_injection(config: ModelConfig, ops: Ops) -> Injection:
    """Return a new injection of the kind that the configuration names.

    config: shape of the model
    ops: table of operations
    """
    return INJECTIONS[config.injection].build(config, ops)


def injection_matrices(config: ModelConfig) -> dict[str, Matrix]:
    """Return the injection's weight matrices by parameter name; none without a core."""
    if config.recurrent is None:
        return {}
    kind = INJECTIONS[config.injection]
    return kind.each(config) | kind.once(config)


def injection_parameters(config: ModelConfig) -> tuple[int, int]:
    """Return the number of parameters used once a pass and in each iteration; 0, 0 without a core.

    config: shape of the model
    """
    if config.recurrent is None:
        return 0, 0
    kind = INJECTIONS[config.injection]
    norm = norm_parameters(config) if _has_norm(config) else 0
    once = sum(m.elements for m in kind.once(config).values())
    each = sum(m.elements for m in kind.each(config).values())
    return norm + once, kind.vectors(config) + each


def injection_flops(config: ModelConfig) -> tuple[float, float]:
    """Return FLOPs per token, forward and backward, of a pass and of each iteration.

    config: shape of a model with a core
    """
    kind = INJECTIONS[config.injection]
    once = sum(m.elements for m in kind.once(config).values())
    each = sum(m.elements for m in kind.each(config).values())
    return 6 * once, 6 * each
