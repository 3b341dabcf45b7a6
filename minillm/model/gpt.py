"""The language model: a trunk and its head.

It knows no ranks, no files and no Triton; `ops` holds its hot operations. The layout of heads is
(B, T, H, D) throughout. Weights may be fp32 while the residual stream, and with it every product,
is in another dtype.
Shapes: B batch, T time, C width of the residual stream, V vocabulary.
"""

import torch
from torch import Tensor

from minillm.config.model import ModelConfig
from minillm.model.init import draw_weights
from minillm.model.inputs import mask_padding_targets
from minillm.model.kv_cache import KVCache
from minillm.model.linear import Head
from minillm.model.size import matrices
from minillm.model.trunk import Trunk
from minillm.ops import Ops, select


class GPT(Trunk):
    """Decoder-only language model.

    config: shape of the model; vocab_size must be set
    ops: table of operations, see minillm.ops.select; default: select("auto") for PyTorch's default
        device, on which the parameters are made. On a CPU these are the eager operations, which a
        model that is moved to a GPU later keeps.
    dtype: dtype of the residual stream; weights are made in fp32
    generator: source of the random numbers for the initial weights; default: PyTorch's own
    Raises ValueError if the configuration lacks vocab_size, or bos_id for a document mask.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        if config.vocab_size is None:
            raise ValueError("config.vocab_size is None; a model needs it")
        if config.document_mask and config.bos_id is None:
            raise ValueError("document_mask needs bos_id, the token each document begins with")
        super().__init__(config, _default_ops(config) if ops is None else ops, dtype)
        self.head = Head(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        draw_weights(self, config, generator)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        recurrence: int | None = None,
        keys: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return logits, (B, T, V) in at least fp32, or the mean loss, () fp32, in nats per token.

        tokens: input tokens, (B, T) int64, T at most seq_len
        targets: target tokens, (B, T) int64, -100 where none counts; those at padding do not count.
            With targets the loss is returned.
        recurrence, keys, attention_mask: see `trunk`
        """
        x = self.trunk(tokens, None, recurrence, keys, attention_mask)
        if targets is None:
            return self.logits(x)
        return self.loss(x, mask_padding_targets(targets, tokens, attention_mask))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits, (..., V) in at least fp32, soft-capped if configured.

        x: output of `trunk`, (..., C)
        """
        z = self.head(x)
        softcap = self.config.logit_softcap
        return softcap * torch.tanh(z / softcap) if softcap else z

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy, () fp32, in nats per token.

        x: output of `trunk`, (B, T, C)
        targets: target tokens, (B, T) int64, -100 where none counts
        """
        return self.ops.linear_cross_entropy(
            x.flatten(0, 1),
            self.head.weight,
            targets.flatten(),
            softcap=self.config.logit_softcap,
        )

    def make_cache(
        self,
        batch: int,
        capacity: int | None = None,
        recurrence: int | None = None,
        warm: bool = False,
    ) -> KVCache:
        """Return an empty KV cache.

        batch: number of rows
        capacity: positions of each row; default: seq_len
        recurrence: iterations whose keys and values are kept separately; default: only the last
        warm: whether the core starts each token from the state in which the one before it ended,
            see `carried`
        Raises ValueError on options of a core if there is none, and on numbers below 1.
        """
        c = self.config
        kept = 1 if recurrence is None else self.iterations(recurrence)
        capacity = c.seq_len if capacity is None else capacity
        return KVCache(
            c.depths, kept, batch, capacity, c.n_kv_head, c.d_head, self.dtype,
            self.head.weight.device, warm,
        )  # fmt: skip

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Return the row counts of the maps stacked in each matrix of blocks and injection."""
        return {name: matrix.rows for name, matrix in matrices(self.config).items()}

    def undecayed(self) -> tuple[str, ...]:
        """Return the names of the matrices that are exempt from weight decay.

        This is the B of the diagonal injection, which begins as 1 (Parcae, arXiv:2604.12946).
        """
        return tuple(name for name, m in matrices(self.config).items() if m.identity)


def _default_ops(config: ModelConfig) -> Ops:
    return select(
        "auto", torch.get_default_device(), d_model=config.d_model, d_head=config.d_head,
        vocab_size=config.vocab_size, dropout=config.dropout,
    )  # fmt: skip
