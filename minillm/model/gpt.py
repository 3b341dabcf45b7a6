"""The decoder. It knows no ranks, no files and no Triton; `ops` holds its hot operations.

Shapes: B batch, T time, C width, G key/value heads, D head width, V vocabulary. Layout is
(B, T, H, D) throughout. Weights may be fp32 while the stream, and with it every product, is in
`dtype`. With recurrent depth the blocks are a prelude, a core that runs r times, and a coda.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.config.model import ModelConfig
from minillm.model.block import make_block, matrices_of_block
from minillm.model.init import draw_weights
from minillm.model.inputs import (
    BlockInputs,
    CoreState,
    check_continuation,
    mask_padding_targets,
)
from minillm.model.kv_cache import KVCache
from minillm.model.linear import Head
from minillm.model.norms import make_norm
from minillm.model.positions import rope_tables, sinusoidal_table, unpadded
from minillm.model.recurrence import Injection, start_noise
from minillm.ops import Ops


class GPT(nn.Module):
    """A decoder-only language model.

    config: its shape; vocab_size must be set.    ops: see minillm.ops.select.
    dtype: of the stream; the weights stay in fp32.    generator: draws the start weights.
    checkpointing: whether blocks, or iterations of the core, are computed again in the backward
    pass instead of kept.    compiled: the blocks by torch.compile, to take where there is no cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("config.vocab_size is None; a model needs it")
        if config.document_mask and config.bos_id is None:
            raise ValueError("document_mask needs bos_id, the token each document begins with")
        self.config, self.ops, self.dtype, self.checkpointing = config, ops, dtype, False
        self.compiled: list | None = None
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.position = nn.Embedding(config.seq_len, config.d_model)
        if config.position == "sinusoidal":
            table = sinusoidal_table(config.seq_len, config.d_model)
            self.register_buffer("sinusoids", table, persistent=False)
        if config.position == "rope":
            cos, sin = rope_tables(config.seq_len, config.d_head, config.rope_base)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.blocks = nn.ModuleList(make_block(config, ops) for _ in range(config.n_layer))
        if config.recurrent is not None:
            self.injection = Injection(config, ops)
        self.norm = make_norm(config, ops)
        self.head = Head(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(config.dropout)
        draw_weights(self, config, generator)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        recurrence: int | None = None,
        keys: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with targets the mean loss.

        tokens: (B, T) int64, T <= seq_len.    targets: (B, T) int64, -100 where none counts.
        recurrence, keys, attention_mask: see `trunk`; what stands at padding is no target.
        Returns (B, T, V) in `dtype`, or () fp32 in nats a token.
        """
        x = self.trunk(tokens, None, recurrence, keys, attention_mask)
        if targets is None:
            return self.logits(x)
        return self.loss(x, mask_padding_targets(targets, tokens, attention_mask))

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, () fp32, of what `trunk` returns, (B, T, C), and targets, (B, T)."""
        return self.ops.linear_cross_entropy(
            x.flatten(0, 1),
            self.head.weight,
            targets.flatten(),
            softcap=self.config.logit_softcap,
        )

    def trunk(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        recurrence: int | None = None,
        keys: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Everything up to the head: (B, T) tokens -> (B, T, C).

        With a cache the tokens follow those it holds; their keys and values are added to it.
        recurrence: how often the core runs; default: the mean. Gradients go through the last
        backprop_depth times.    keys: (B,) int64 of the start states, see recurrence.state_keys;
        default: zeros.    attention_mask: (B, T), 0 where a row is padded, before or after its
        tokens: these give what they give alone, and what comes out at padding means nothing.
        Raises ValueError if the positions reach beyond seq_len, the model has no core to run, the
        mask is not of the tokens' shape, has a hole or comes with a cache, whose rows may differ in
        length without one, or if these tokens cannot follow those of the cache, see
        check_continuation.
        """
        r = self.iterations(recurrence)
        if cache is not None:
            check_continuation(self.config, tokens, cache, r)
        core = self.begin(tokens, cache, keys, attention_mask)
        free = max(0, r - self.config.backprop_depth) if r and torch.is_grad_enabled() else 0
        with torch.no_grad():
            core = self.iterate(core, free)
        core = self.iterate(core, r)
        x = self.finish(core)
        if cache is not None:
            if cache.warm:
                cache.state = self.carried(core.state[:, -1])
            cache.advance(tokens.shape[1], r or None)
        return x

    def readings(
        self, tokens: Tensor, recurrences: list[int], keys: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(r, what `trunk` returns, the state) for each r of an ascending list, in one run to the
        last: (B, T, C) each. Raises ValueError on another list, or a model without a core.
        """
        if any(self.iterations(r) <= before for before, r in pairwise([0, *recurrences])):
            raise ValueError(f"recurrences {recurrences}: expected each above the one before")
        core = self.begin(tokens, None, keys)
        for r in recurrences:
            core = self.iterate(core, r)
            yield r, self.finish(core), core.state

    def begin(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        keys: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> CoreState:
        """Return a pass over tokens, (B, T), that has stopped before the first iteration.

        `iterate` and `finish` take it further; the parameters are those of `trunk`.
        """
        inputs, x = self.embed_tokens(tokens, cache, attention_mask)
        prelude, core, _ = self.config.depths
        x = self.run(range(prelude), x, inputs)
        if not core:
            return CoreState(inputs, None, x)
        return CoreState(inputs, self.injection.prepare(x), self.start_state(x, keys, inputs))

    def iterate(self, core: CoreState, until: int) -> CoreState:
        """Return the pass after `until` iterations of the core; it may have had some of them.

        With `checkpointing`, iterations are computed again in the backward pass.
        """
        s = core.state
        for i in range(core.done, until):
            if self.checkpointing and torch.is_grad_enabled():
                s = checkpoint(self._iteration, s, core.text, core.inputs, i, use_reentrant=False)
            else:
                s = self._iteration(s, core.text, core.inputs, i)
        return replace(core, state=s, done=max(core.done, until))

    def _iteration(self, s: Tensor, text: Tensor, inputs: BlockInputs, i: int) -> Tensor:
        """Return the state after iteration i, counted from 0."""
        prelude, core, _ = self.config.depths
        return self.run(range(prelude, prelude + core), self.injection(s, text), inputs, i)

    def finish(self, core: CoreState) -> Tensor:
        """Return the output of the trunk, (B, T, C), for the state that the core has reached."""
        prelude, n_core, coda = self.config.depths
        x = self.norm(core.state) if n_core else core.state
        x = self.run(range(prelude + n_core, prelude + n_core + coda), x, core.inputs)
        return self.norm(x)

    def embed_tokens(
        self, tokens: Tensor, cache: KVCache | None, attention_mask: Tensor | None = None
    ) -> tuple[BlockInputs, Tensor]:
        """Return the inputs of the blocks, and the embedded tokens, (B, T, C)."""
        c, T, held = self.config, tokens.shape[1], 0 if cache is None else max(cache.lengths)
        if held + T > c.seq_len:
            raise ValueError(f"{held + T} positions; seq_len is {c.seq_len}")
        ragged = cache is not None and not cache.uniform()
        at = cache.positions(T) if ragged else slice(held, held + T)
        pieces = None
        if attention_mask is not None:
            if cache is not None:
                raise ValueError("an attention mask and a cache exclude each other")
            if attention_mask.shape != tokens.shape:
                found, wanted = tuple(attention_mask.shape), tuple(tokens.shape)
                raise ValueError(f"attention_mask is {found}; expected {wanted}, as the tokens are")
            at, pieces = unpadded(attention_mask.bool())
        x = self.embed(tokens)  # (B, T, C)
        if c.init == "takase" or c.position == "sinusoidal":
            x = x * math.sqrt(c.d_model)
        if c.position == "learned":
            x = x + self.position.weight[at]
        elif c.position == "sinusoidal":
            x = x + self.sinusoids[at]
        rotation = None
        if c.position == "rope":
            # While decoding the rows of the tables are taken where they are needed. Rotations are
            # relative: how much padding stands before all tokens of a row is no matter.
            rows = slice(None) if held else slice(0, T)
            rotation = self.cos[rows], self.sin[rows]  # (P or T, D/2)
        documents = None
        if c.document_mask and cache is None:
            documents = (tokens == c.bos_id).cumsum(1)  # (B, T)
        if pieces is not None:
            documents = pieces if documents is None else documents + pieces * (T + 1)
        return BlockInputs(at, rotation, documents, cache), self.dropout(x).to(self.dtype)

    def start_state(self, like: Tensor, keys: Tensor | None, inputs: BlockInputs) -> Tensor:
        """What the core starts from, (B, T, C), as `like`: zeros or noise, but in a warm cache the
        first new token where the one before it ended.
        """
        s = self._cold_state(like, keys, inputs)
        if inputs.cache is not None and inputs.cache.state is not None:
            s[:, 0] = inputs.cache.state
        return s

    def _cold_state(self, like: Tensor, keys: Tensor | None, inputs: BlockInputs) -> Tensor:
        if self.config.start_state == "zero":
            return torch.zeros_like(like)
        B, _, C = like.shape
        if keys is None:
            keys = torch.zeros(B, dtype=torch.int64, device=like.device)
        if keys.shape != (B,):
            raise ValueError(f"keys are {tuple(keys.shape)}; expected ({B},), one for each row")
        at = inputs.positions
        if isinstance(at, slice):
            at = torch.arange(at.start, at.stop, device=like.device)
        return start_noise(keys, at, C, like.dtype)

    def carried(self, s: Tensor) -> Tensor:
        """What a warm cache hands on to the next token, of the state the core ended in, (B, C).

        Style huginn: the state as the coda reads it, through the last norm, as the published
        implementation does (generate_minimal with continuous_compute in raven_modeling_minimal.py;
        source: see huginn.py). Style parcae: the state itself.
        """
        return self.norm(s) if self.config.recurrence_style == "huginn" else s

    def run(self, layers: range, x: Tensor, inputs: BlockInputs, i: int = 0) -> Tensor:
        """Blocks one after the other; i: the iteration, of blocks of the core."""
        prelude, core, _ = self.config.depths
        for n in layers:
            of_core = prelude <= n < prelude + core  # iterations are computed again whole
            again = self.checkpointing and torch.is_grad_enabled() and not of_core
            slot = 0 if inputs.cache is None else inputs.cache.slot(n, i)
            arguments = x, inputs.rotation, inputs.documents, inputs.cache, slot
            fast = self.compiled is not None and inputs.cache is None
            block = self.compiled[n] if fast else self.blocks[n]
            x = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        return x

    def iterations(self, recurrence: int | None) -> int:
        """How often the core runs, 0 without one. ValueError on a recurrence that cannot be."""
        if self.config.recurrent is None:
            if recurrence is not None:
                raise ValueError(f"recurrence {recurrence}: the model has no core to run again")
            return 0
        r = self.config.mean_recurrence if recurrence is None else recurrence
        if r < 1:
            raise ValueError(f"recurrence {r}: expected 1 or more")
        return r

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of x (..., C), at least fp32, soft-capped if configured."""
        z = self.head(x)
        softcap = self.config.logit_softcap
        return softcap * torch.tanh(z / softcap) if softcap else z

    def make_cache(
        self,
        batch: int,
        capacity: int | None = None,
        recurrence: int | None = None,
        warm: bool = False,
    ) -> KVCache:
        """An empty cache for `batch` rows of `capacity` (default seq_len) positions.

        recurrence: iterations to keep keys and values of, each its own; default: only the last.
        warm: the core starts each token where the one before it ended, see `carried`.
        Raises ValueError on a core's options where there is none, and on numbers below 1.
        """
        c = self.config
        kept = 1 if recurrence is None else self.iterations(recurrence)
        capacity = c.seq_len if capacity is None else capacity
        return KVCache(
            c.depths, kept, batch, capacity, c.n_kv_head, c.d_head, self.dtype,
            self.head.weight.device, warm,
        )  # fmt: skip

    def undecayed(self) -> tuple[str, ...]:
        """Matrices that weight decay leaves alone: the diagonal injection's B, which begins as 1
        (Parcae, arXiv:2604.12946).
        """
        return ("injection.text.weight",) if self.config.injection == "diagonal" else ()

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """The blocks' weight matrices, and the rows of the independent maps stacked in each."""
        found = {
            f"blocks.{i}.{name}": parts
            for i in range(self.config.n_layer)
            for name, parts in matrices_of_block(self.config).items()
        }
        injected = [n for n, w in self.named_parameters() if w.dim() == 2 and "injection." in n]
        return found | dict.fromkeys(injected, (self.config.d_model,))
