"""Shape of a decoder: one frozen configuration, which is checked when it is made.

Each field is also a flag, see flags.py. Here stand only the names of norms, MLPs, positions and
injections; their implementations, with a table by name, are in model/.
"""

from argparse import ArgumentTypeError
from dataclasses import dataclass, fields
from itertools import count

from minillm.config.fields import check_range, setting
from minillm.errors import UsageError, parameter

POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "none")
NORMS = ("rmsnorm", "layernorm")
MLPS = ("swiglu", "geglu", "gelu", "gelu-tanh", "relu2")
GATED = ("swiglu", "geglu")
INITS = ("gpt2", "zero", "takase")
STYLES = ("huginn", "parcae")
INJECTIONS = ("concat", "add", "diagonal")
STARTS = ("noise", "zero")
SHALLOW = 8  # largest mean recurrence at which gradients go through all iterations by default


def depths_text(text: str) -> str:
    """Return a text of the form PRELUDE,CORE,CODA, checked and without spaces.

    Raises argparse.ArgumentTypeError on any other text.
    """
    parts = [part.strip() for part in text.split(",")]
    fits = len(parts) == 3 and all(p.isascii() and p.isdigit() and len(p) < 5 for p in parts)
    if not fits or int(parts[1]) < 1:
        raise ArgumentTypeError(
            f"{text!r} is not PRELUDE,CORE,CODA with a core of at least one block, such as 1,2,1"
        )
    return ",".join(str(int(p)) for p in parts)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Fields that are None are derived from the others.

    Raises UsageError, which names the field, if the fields do not fit together.
    """

    vocab_size: int | None = setting(
        None, "number of tokens in the vocabulary", group="model", low=1, high=1 << 24,
        derived="the tokenizer's; for bpe chosen from the amount of text",
    )  # fmt: skip
    seq_len: int = setting(256, "context length in tokens", low=1, high=1 << 24)
    n_layer: int = setting(6, "number of blocks", low=1, high=10000)
    n_head: int = setting(6, "number of query heads", low=1, high=10000)
    n_kv_head: int | None = setting(
        None, "number of key/value heads, a divisor of --n-head (1: multi-query attention)", low=1,
        high=10000, derived="--n-head",
    )  # fmt: skip
    d_model: int = setting(384, "width of the residual stream", low=1, high=1 << 20)
    d_head: int | None = setting(
        None, "width of an attention head", low=1, high=1 << 20, derived="--d-model / --n-head"
    )
    d_ff: int | None = setting(
        None, "hidden width of the MLP", low=1, high=1 << 24,
        derived="4 x --d-model; gated MLPs: 8/3 x, rounded up to a multiple of 64",
    )  # fmt: skip
    position: str = setting("rope", "position encoding", choices=POSITIONS)
    rope_base: float = setting(10000.0, "base of the rotary frequencies", low=1.0)
    norm: str = setting("rmsnorm", "normalisation layer", choices=NORMS)
    norm_eps: float = setting(
        1e-6, "number added to the variance before the square root", low=0.0, high=1.0
    )
    mlp: str = setting(
        "swiglu", "type of the MLP; swiglu and geglu are gated", choices=MLPS
    )  # fmt: skip
    bias: bool = setting(False, "add biases to linear layers and layer norms")
    qk_norm: bool = setting(False, "normalise each query and key head with RMSNorm")
    qk_bias: bool = setting(False, "add learned biases to queries and keys, before the rotation")
    window: int = setting(
        0, "length of the sliding attention window in tokens (0: the whole context)", low=0
    )
    tie_embeddings: bool = setting(False, "use one matrix for the embedding and the output head")
    dropout: float = setting(
        0.0, "dropout rate of embeddings, attention and residual branches (0: none)", low=0.0,
        high=0.99,
    )  # fmt: skip
    logit_softcap: float = setting(
        0.0, "limit to which tanh caps the logits (0: no limit)", low=0.0
    )
    init: str | None = setting(
        None, "initial weights: zero starts output projections and head at 0; takase is truncated "
        "and scaled by width and depth",
        choices=INITS, derived="gpt2; with --recurrent takase, for every preset",
    )  # fmt: skip
    document_mask: bool = setting(
        False, "restrict attention to the document; a BOS token begins each document"
    )
    recurrent: str | None = setting(
        None, "number of blocks before, in and after a core that is run several times, such as "
        "1,2,1; it replaces --n-layer",
        group="recurrence", parse=depths_text, metavar="P,R,C",
    )  # fmt: skip
    recurrence_style: str = setting(
        "huginn", "design of the core. huginn: sandwich norms, concatenated injection, random "
        "start state (Geiping et al. 2025). parcae: pre-norm, QK-norm, contractive diagonal "
        "injection", choices=STYLES,
    )  # fmt: skip
    injection: str | None = setting(
        None, "operation by which the embedded text enters each iteration", choices=INJECTIONS,
        derived="huginn: concat, parcae: diagonal",
    )  # fmt: skip
    start_state: str | None = setting(
        None, "state before the first iteration; noise depends on seed, sample and position",
        choices=STARTS, derived="huginn: noise, parcae: zero",
    )  # fmt: skip
    mean_recurrence: int = setting(8, "mean number of iterations of the core", low=1, high=4096)
    max_recurrence: int | None = setting(
        None, "largest number of iterations; larger draws are cut to it", low=1, high=16384,
        derived="4 x --mean-recurrence",
    )  # fmt: skip
    backprop_depth: int | None = setting(
        None, "number of last iterations in each pass that gradients flow through", low=1,
        high=16384,
        derived=f"all if --mean-recurrence is at most {SHALLOW}, else {SHALLOW}",
    )  # fmt: skip
    bos_id: int | None = None  # the tokenizer's token that begins a document

    def __post_init__(self) -> None:
        for f in fields(self):
            check_range(f, getattr(self, f.name))
        if self.d_head is None:
            if self.d_model % self.n_head:
                raise UsageError(_divisor("n_head", self.n_head, "d_model", self.d_model))
            object.__setattr__(self, "d_head", self.d_model // self.n_head)
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if self.n_head % self.n_kv_head:
            raise UsageError(_divisor("n_kv_head", self.n_kv_head, "n_head", self.n_head))
        if self.d_ff is None:
            wide = -(-8 * self.d_model // 3 // 64) * 64 if self.mlp in GATED else 4 * self.d_model
            object.__setattr__(self, "d_ff", wide)
        if self.position == "rope" and self.d_head % 2:
            raise UsageError(
                f"{parameter('position')} rope needs an even {parameter('d_head')}; "
                f"got {self.d_head}"
            )
        if self.position == "sinusoidal" and self.d_model % 2:
            raise UsageError(
                f"{parameter('position')} sinusoidal needs an even {parameter('d_model')}; "
                f"got {self.d_model}"
            )
        if self.recurrent is not None:
            self._derive_recurrence()
        if self.init is None:
            object.__setattr__(self, "init", "takase" if self.recurrent is not None else "gpt2")
        if self.init == "zero" and self.tie_embeddings:
            raise UsageError(
                f"{parameter('init')} zero would zero the embedding that "
                f"{parameter('tie_embeddings')} shares"
            )

    def _derive_recurrence(self) -> None:
        try:
            object.__setattr__(self, "recurrent", depths_text(self.recurrent))
        except ArgumentTypeError as error:
            raise UsageError(f"{parameter('recurrent')}: {error}") from None
        if sum(self.depths) > 10000:
            raise UsageError(
                f"{parameter('recurrent')} {self.recurrent} is {sum(self.depths)} blocks; "
                "at most 10000"
            )
        huginn = self.recurrence_style == "huginn"
        if huginn and self.norm != "rmsnorm":
            raise UsageError(
                f"{parameter('recurrence_style')} huginn needs {parameter('norm')} rmsnorm"
            )
        derived = {
            "n_layer": sum(self.depths),
            "qk_norm": self.qk_norm or not huginn,
            "injection": self.injection or ("concat" if huginn else "diagonal"),
            "start_state": self.start_state or ("noise" if huginn else "zero"),
            "max_recurrence": self.max_recurrence or 4 * self.mean_recurrence,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        if self.max_recurrence < self.mean_recurrence:
            raise UsageError(
                f"{parameter('max_recurrence')} {self.max_recurrence} is below "
                f"{parameter('mean_recurrence')} {self.mean_recurrence}"
            )
        if self.backprop_depth is None:
            shallow = self.mean_recurrence <= SHALLOW
            object.__setattr__(self, "backprop_depth", self.max_recurrence if shallow else SHALLOW)

    @property
    def depths(self) -> tuple[int, int, int]:
        """Return the number of blocks of prelude, core and coda; without a core all are prelude."""
        if self.recurrent is None:
            return self.n_layer, 0, 0
        return tuple(map(int, self.recurrent.split(",")))

    @property
    def effective_layers(self) -> int:
        """Return the number of blocks that a token passes at the mean recurrence."""
        prelude, core, coda = self.depths
        return prelude + core * self.mean_recurrence + coda


def _divisor(name: str, value: int, whole_name: str, whole: int) -> str:
    nearest = nearest_divisor(value, whole)
    return (
        f"{parameter(name)} {value} does not divide {parameter(whole_name)} {whole}; "
        f"nearest: {nearest}"
    )


def nearest_divisor(value: int, whole: int) -> int:
    """Return the divisor that is closest to a number, the larger one of two.

    value: number
    whole: number to be divided
    """
    near = (d for k in count() for d in (value + k, value - k))
    return next(d for d in near if 0 < d <= whole and whole % d == 0)
