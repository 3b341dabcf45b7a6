"""The decoder up to its head: embedding, blocks, recurrent core and last norm.

A pass has three parts, so that other files can stop it between two iterations of the core:

    begin     embed the tokens, run the prelude, and make the initial state of the core
    iterate   run the core, any number of times
    finish    run the coda and the last norm

Without recurrent depth all blocks are prelude, and `iterate` has nothing to do.
Shapes: B batch, T time, C width of the residual stream.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.config.model import ModelConfig
from minillm.model.block import block_class
from minillm.model.init import scales_embedding
from minillm.model.injection import make_injection
from minillm.model.inputs import (
    BlockInputs,
    CoreState,
    check_continuation,
    documents_of,
    positions_of,
)
from minillm.model.kv_cache import KVCache
from minillm.model.norms import make_norm
from minillm.model.positions import POSITIONS
from minillm.model.recurrence import initial_state
from minillm.ops import Ops


class Trunk(nn.Module):
    """Decoder without its head, the base class of GPT.

    config: shape of the model
    ops: table of operations
    dtype: dtype of the residual stream

    checkpointing: attribute; True computes blocks, or iterations of the core, again in the backward
        pass instead of keeping their activations
    compiled: attribute; the blocks by torch.compile, which are used where there is no cache
    """

    def __init__(self, config: ModelConfig, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.ops, self.dtype, self.checkpointing = config, ops, dtype, False
        self.compiled: list | None = None
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.position = POSITIONS[config.position].build(config)
        block = block_class(config)
        self.blocks = nn.ModuleList(block(config, ops) for _ in range(config.n_layer))
        if config.recurrent is not None:
            self.injection = make_injection(config, ops)
        self.norm = make_norm(config, ops)
        self.dropout = nn.Dropout(config.dropout)

    def trunk(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        recurrence: int | None = None,
        keys: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return everything up to the head, (B, T, C).

        tokens: input tokens, (B, T) int64
        cache: earlier tokens, which these follow; their keys and values are added to it
        recurrence: iterations of the core, of which the last backprop_depth have gradients;
            default: the mean
        keys: keys of the initial states, (B,) int64, see recurrence.state_keys; default: zeros
        attention_mask: (B, T), 0 where a row is padded, before or after its tokens. The others give
            what they give without padding; the output at padding is meaningless.
        Raises ValueError if positions reach beyond seq_len, if the model has no core to run, if the
        mask has another shape than the tokens, has a hole, or comes with a cache (rows of a cache
        may differ in length without a mask), or if the tokens cannot follow those of the cache, see
        inputs.check_continuation.
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
        """Yield (r, output of `trunk` after r iterations, state), from one pass; (B, T, C) each.

        tokens: input tokens, (B, T) int64
        recurrences: values of r in ascending order
        keys: see `trunk`
        Raises ValueError if the list is not ascending, or the model has no core.
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

        `iterate` and `finish` continue it.

        tokens, cache, keys, attention_mask: see `trunk`
        """
        inputs, x = self.embed_tokens(tokens, cache, attention_mask)
        prelude, core, _ = self.config.depths
        x = self.run(range(prelude), x, inputs)
        if not core:
            return CoreState(inputs, None, x)
        return CoreState(inputs, self.injection.prepare(x), self.start_state(x, keys, inputs))

    def iterate(self, core: CoreState, until: int) -> CoreState:
        """Return the pass after more iterations of the core.

        With `checkpointing`, they are computed again in the backward pass.

        core: pass that has stopped before or between iterations
        until: number of iterations after which it stops again, counted from the first
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
        """Return the inputs of the blocks, and the embedded tokens, (B, T, C).

        tokens, cache, attention_mask: see `trunk`
        """
        c, T, held = self.config, tokens.shape[1], 0 if cache is None else max(cache.lengths)
        if held + T > c.seq_len:
            raise ValueError(f"{held + T} positions; seq_len is {c.seq_len}")
        at, segments = positions_of(tokens, cache, attention_mask)
        x = self.embed(tokens)  # (B, T, C)
        if self.position.scales_embedding or scales_embedding(c):
            x = x * math.sqrt(c.d_model)
        x = self.position.encode(x, at)
        # While decoding the rows of the tables are taken where they are needed. Rotations are
        # relative: how much padding stands before all tokens of a row does not matter.
        rotation = self.position.rotation(slice(None) if held else slice(0, T))
        documents = documents_of(c, tokens, cache, segments)
        return BlockInputs(at, rotation, documents, cache), self.dropout(x).to(self.dtype)

    def start_state(self, like: Tensor, keys: Tensor | None, inputs: BlockInputs) -> Tensor:
        """Return the state before the first iteration, (B, T, C).

        It is zeros or noise. In a warm cache the first new token starts from the state in which the
        one before it ended.

        like: tensor whose shape, (B, T, C), dtype and device the state gets
        keys: see `trunk`
        inputs: inputs of the blocks
        """
        s = initial_state(self.config, like, keys, inputs.positions)
        if inputs.cache is not None and inputs.cache.state is not None:
            s[:, 0] = inputs.cache.state
        return s

    def carried(self, s: Tensor) -> Tensor:
        """Return the state that a warm cache carries on to the next token, (B, C).

        In the style huginn this is the state as the coda reads it, through the last norm, as in the
        published implementation (generate_minimal with continuous_compute in
        raven_modeling_minimal.py; source: see convert/huginn.py). In the style parcae it is the
        state itself.

        s: state after the last iteration, (B, C)
        """
        return self.norm(s) if self.config.recurrence_style == "huginn" else s

    def run(self, layers: range, x: Tensor, inputs: BlockInputs, i: int = 0) -> Tensor:
        """Return the stream after some blocks, (B, T, C).

        layers: numbers of the blocks
        x: stream before them, (B, T, C)
        inputs: inputs of the blocks
        i: iteration, counted from 0, if they are blocks of the core
        """
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
        """Return the number of iterations of the core, 0 without a core.

        recurrence: requested number; default: the mean
        Raises ValueError on a number below 1, or any number for a model without a core.
        """
        if self.config.recurrent is None:
            if recurrence is not None:
                raise ValueError(f"recurrence {recurrence}: the model has no core to run again")
            return 0
        r = self.config.mean_recurrence if recurrence is None else recurrence
        if r < 1:
            raise ValueError(f"recurrence {r}: expected 1 or more")
        return r
