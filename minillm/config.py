"""What a model is: the frozen ModelConfig, checked when it is made.

How it is trained stands in settings.py, the named presets in presets.py.
"""

from dataclasses import Field, dataclass, field, fields
from typing import Any

from minillm.errors import UsageError

POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "none")
NORMS = ("rmsnorm", "layernorm")
MLPS = ("swiglu", "geglu", "gelu", "gelu-tanh", "relu2")
GATED = ("swiglu", "geglu")
INITS = ("gpt2", "zero")


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field that is also a flag: default, help, and `low`, `high` or `choices`."""
    return field(default=default, metadata={"help": help, **rules})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Fields left at None are derived, so that a made config has none.

    Raises UsageError, naming the flag, if the fields do not fit together.
    """

    vocab_size: int | None = setting(
        None, "tokens in the vocabulary; for bpe chosen from the corpus size if not given",
        group="model",
        low=1, high=1 << 24,
    )  # fmt: skip
    seq_len: int = setting(256, "context, in tokens", low=1, high=1 << 24)
    n_layer: int = setting(6, "blocks", low=1, high=10000)
    n_head: int = setting(6, "query heads", low=1, high=10000)
    n_kv_head: int | None = setting(
        None, "key/value heads: --n-head gives MHA, 1 MQA, between GQA; default: --n-head", low=1,
        high=10000,
    )  # fmt: skip
    d_model: int = setting(384, "width of the residual stream", low=1, high=1 << 20)
    d_head: int | None = setting(
        None, "width of a head; default: --d-model / --n-head", low=1, high=1 << 20
    )
    d_ff: int | None = setting(
        None, "width of the MLP; default: 4 x --d-model, gated: 8/3 x, up to a multiple of 64",
        low=1, high=1 << 24,
    )  # fmt: skip
    position: str = setting("rope", "how positions enter", choices=POSITIONS)
    rope_base: float = setting(10000.0, "base of the rotary frequencies", low=1.0)
    norm: str = setting("rmsnorm", "normalisation", choices=NORMS)
    norm_eps: float = setting(1e-6, "added to the variance under the root", low=0.0, high=1.0)
    mlp: str = setting("swiglu", "MLP", choices=MLPS)
    bias: bool = setting(False, "biases in linear layers and layer norms")
    qk_norm: bool = setting(False, "RMSNorm of each query and key head")
    window: int = setting(0, "sliding window, in tokens with the query's own; 0: none", low=0)
    tie_embeddings: bool = setting(False, "the head shares the embedding's matrix")
    dropout: float = setting(
        0.0, "dropout of embeddings, attention and residual branches", low=0.0, high=0.99
    )
    logit_softcap: float = setting(0.0, "logits are capped at +-this by tanh; 0: none", low=0.0)
    init: str = setting(
        "gpt2", "start weights: gpt2, or zero (output projections and head at 0)", choices=INITS
    )
    document_mask: bool = setting(False, "attention stays within a document (marked by its BOS)")
    bos_id: int | None = None  # the tokenizer's, where documents begin

    def __post_init__(self) -> None:
        for f in fields(self):
            check_range(f, getattr(self, f.name))
        if self.d_head is None:
            if self.d_model % self.n_head:
                raise UsageError(_divisor("--n-head", self.n_head, "--d-model", self.d_model))
            object.__setattr__(self, "d_head", self.d_model // self.n_head)
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if self.n_head % self.n_kv_head:
            raise UsageError(_divisor("--n-kv-head", self.n_kv_head, "--n-head", self.n_head))
        if self.d_ff is None:
            wide = -(-8 * self.d_model // 3 // 64) * 64 if self.mlp in GATED else 4 * self.d_model
            object.__setattr__(self, "d_ff", wide)
        if self.position == "rope" and self.d_head % 2:
            raise UsageError(f"--position rope needs an even --d-head; got {self.d_head}")
        if self.position == "sinusoidal" and self.d_model % 2:
            raise UsageError(f"--position sinusoidal needs an even --d-model; got {self.d_model}")
        if self.init == "zero" and self.tie_embeddings:
            raise UsageError("--init zero would zero the embedding that --tie-embeddings shares")

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies by a gate."""
        return self.mlp in GATED

    @property
    def n_matrix_parameters(self) -> int:
        """Parameters that multiply activations: the blocks' matrices and the head."""
        attention = (2 * self.n_head + 2 * self.n_kv_head) * self.d_head * self.d_model
        mlp = (3 if self.gated else 2) * self.d_ff * self.d_model
        return self.n_layer * (attention + mlp) + (self.vocab_size or 0) * self.d_model

    @property
    def n_parameters(self) -> int:
        """All parameters that are stored, tied ones once."""
        C = self.d_model
        n = self.n_matrix_parameters
        if not self.tie_embeddings:
            n += (self.vocab_size or 0) * C
        if self.position == "learned":
            n += self.seq_len * C
        heads = self.n_head + 2 * self.n_kv_head
        per_layer = 2 * self.d_head if self.qk_norm else 0
        if self.bias:
            up = 2 * self.d_ff if self.gated else self.d_ff
            per_layer += heads * self.d_head + C + up + C
        norms = (2 if self.bias and self.norm == "layernorm" else 1) * C
        return n + self.n_layer * (per_layer + 2 * norms) + norms

    def flops_per_token(self) -> float:
        """Forward and backward: 6 N + 12 L H D T.

        Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
        """
        span = min(self.seq_len, self.window or self.seq_len)
        return 6 * self.n_matrix_parameters + 12 * self.n_layer * self.n_head * self.d_head * span


def check_range(f: Field, value: Any) -> None:
    """Raise UsageError if a field's value is outside what its `setting` allows."""
    rules, flag = f.metadata, "--" + f.name.replace("_", "-")
    if value is None or not rules:
        return
    if "choices" in rules and value not in rules["choices"]:
        raise UsageError(f"{flag} {value!r} is not one of {', '.join(rules['choices'])}")
    low, high = rules.get("low"), rules.get("high")
    if low is not None and not low <= value <= (high if high is not None else value):
        span = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise UsageError(f"{flag} {value} is out of range; expected {span}")


def _divisor(flag: str, value: int, whole_flag: str, whole: int) -> str:
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    nearest = min(divisors, key=lambda d: (abs(d - value), -d))
    return f"{flag} {value} does not divide {whole_flag} {whole}; nearest: {nearest}"
