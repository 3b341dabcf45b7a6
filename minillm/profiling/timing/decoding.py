"""Suite `decode`: speed of decoding in new tokens a second, by batch and length of context.

A row has implementation, batch, context, tokens_per_s, spread (of tokens_per_s) and note. The time
is wall-clock time, launches included, from one drawn token to the next, each at the same context.
It leaves out two parts of `generate`: the log-probabilities and the lists of tokens.
"""

import time
from collections.abc import Callable

import torch

from minillm.config.train import ModelConfig
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from minillm.profiling.timing.implementations import Absent, error_in_words, triton_table
from minillm.profiling.timing.operations import Effort, Row
from minillm.runtime.device import DTYPES, synchronize
from minillm.runtime.stopwatch import LEAST, MOST, middle

NOT_COMPILED = "`generate` meets keys of another length, for the compiler a shape, with each token"


def cells(kind: str, quick: bool) -> list[tuple[int, int]]:
    """Return the pairs (batch, context) that are measured.

    kind: "cuda" or "cpu"
    quick: return one or two pairs
    """
    if kind == "cuda":
        return [(1, 1024), (16, 4096)] if quick else [
            (batch, context) for batch in (1, 16, 64) for context in (1024, 4096, 16384)
        ]  # fmt: skip
    return [(1, 64)] if quick else [(b, context) for b in (1, 8) for context in (256, 1024)]


def shape(kind: str, longest: int) -> ModelConfig:
    """Return the model: 152M parameters with four queries to a key on a GPU, a small one on a CPU.

    kind: "cuda" or "cpu"
    longest: longest context in tokens
    """
    if kind == "cuda":
        return ModelConfig(
            vocab_size=50304, seq_len=longest, n_layer=12, n_head=12, n_kv_head=3, d_model=768,
            qk_norm=True,
        )  # fmt: skip
    return ModelConfig(
        vocab_size=4096, seq_len=longest, n_layer=2, n_head=4, n_kv_head=2, d_model=128,
        qk_norm=True,
    )  # fmt: skip


def run(
    device: torch.device, dtype: str, effort: Effort, quick: bool, say: Callable[[str], None]
) -> list[Row]:
    """Return a row for each table of kernels, batch and context.

    device, dtype: device and dtype of the model
    effort: time for each row
    quick: few and small cells
    say: called with each line of progress
    """
    chosen = cells(device.type, quick)
    config = shape(device.type, max(context for _, context in chosen) + 1)
    rows = []
    for name, ops in (("eager", EAGER), ("triton", triton_table(device))):
        say(f"decode, {name}")
        if isinstance(ops, Absent):
            rows += [_row(name, cell, note=ops) for cell in chosen]
            continue
        try:
            model = GPT(config, ops, DTYPES[dtype], torch.Generator().manual_seed(0)).to(device)
        except Exception as e:
            rows += [_row(name, cell, note=error_in_words(e)) for cell in chosen]
            continue
        for cell in chosen:
            try:
                rows.append(measured(name, cell, model.eval(), device, effort))
            except Exception as e:  # out of memory: a row says so
                rows.append(_row(name, cell, note=error_in_words(e)))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return [*rows, *(_row("compile", cell, note=NOT_COMPILED) for cell in chosen)]


@torch.inference_mode()
def measured(
    name: str, cell: tuple[int, int], model: GPT, device: torch.device, effort: Effort
) -> Row:
    """Return the row of one batch and context.

    name: name of the table of kernels, for the row
    cell: the batch and the context
    model: model whose context has at least one token more
    device: device of the model
    effort: time for the row
    """
    batch, context = cell
    cache = model.make_cache(batch, context + 1)
    for held in (cache.k, cache.v):
        held.normal_()
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    samples, taken = torch.arange(batch, device=device), []

    def token(made: int) -> None:
        cache.lengths = [context] * batch
        logits = model.logits(model.trunk(tokens, cache)[:, -1]).float()
        u = model.ops.uniform(0, samples, torch.full_like(samples, made))
        tokens[:, 0] = model.ops.sample(logits, u, temperature=0.8, top_p=0.95)
        tokens.cpu()  # `generate` does this for each token

    for made in range(3):
        token(made)
    synchronize(device)
    end = time.perf_counter() + 2 * effort.seconds
    while len(taken) < LEAST or (time.perf_counter() < end and len(taken) < MOST):
        start = time.perf_counter()
        token(len(taken))
        taken.append(time.perf_counter() - start)
    return _row(name, cell, *middle([batch / seconds for seconds in taken]))


def _row(
    name: str,
    cell: tuple[int, int],
    tokens_per_s: float | None = None,
    spread: float | None = None,
    note: str = "",
) -> Row:
    return {
        "implementation": name,
        "batch": cell[0],
        "context": cell[1],
        "tokens_per_s": tokens_per_s,
        "spread": spread,
        "note": note,
    }
