"""Adaptive exit: each token runs through the core only as often as it needs to.

    confidence   the likeliest token has a probability above the threshold
    kl           the distribution hardly changes: KL(before || now) below the threshold
    latent       the state hardly changes: |s - before| / |s| below the threshold

for patience + 1 iterations running, in fp32. Confidence and kl cost the coda and the head in every
iteration; latent costs them once a token read alone, and where all are read at once in iterations
in which some leave. A token that waits for an earlier one stands still and
looks settled: where all tokens are read at once, kl and latent let none go before all earlier ones
have gone. Confidence need not wait, but wants patience (3 was right where 0 was wrong).
Source: Geiping et al. 2025, arXiv:2502.05171, section 6.1, for kl and latent.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minillm.inference.exit_rules import ExitRule
from minillm.model.gpt import GPT
from minillm.model.inputs import check_continuation
from minillm.model.kv_cache import KVCache


class Watch:
    """For how many iterations running each token has met the rule."""

    def __init__(self, rule: ExitRule) -> None:
        self.rule = rule
        self.held: Tensor | None = None
        self.logp: Tensor | None = None

    def leaves(self, s: Tensor, before: Tensor, logits: Tensor | None) -> Tensor:
        """Which tokens may leave: (B, T).    s, before: (B, T, C).    logits: (B, T, V), where the
        rule hears them.
        """
        rule = self.rule
        if rule.by == "latent":
            change = (s.float() - before.float()).norm(dim=-1)
            met = change < rule.threshold * s.float().norm(dim=-1)
        elif rule.by == "confidence":
            met = logits.float().softmax(-1).amax(-1) > rule.threshold
        else:
            logp = logits.float().log_softmax(-1)
            met = torch.zeros(logp.shape[:-1], dtype=torch.bool, device=logp.device)
            if self.logp is not None:
                old = self.logp
                # Of equal distributions rounding may leave less than nothing.
                met = (old.exp() * (old - logp)).sum(-1).clamp(min=0) < rule.threshold
            self.logp = logp
        held = torch.zeros_like(met, dtype=torch.int64) if self.held is None else self.held
        self.held = torch.where(met, held + 1, 0)
        return self.held > rule.patience

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.held = self.held[rows]
        self.logp = None if self.logp is None else self.logp[rows]


@torch.no_grad()
def read(
    model: GPT, tokens: Tensor, rule: ExitRule, most: int, keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once, each out of the core when it may: logits (B, T, V), iterations (B, T).

    most: iterations after which all leave. A token that has left keeps its state, which later ones
    go on to see; a row all of whose tokens have left is no longer computed.
    Raises ValueError if the model has no core, or `most` is below 1.
    """
    model.iterations(most)
    core = model.begin(tokens, None, keys)
    B, T = tokens.shape
    logits = torch.empty(B, T, model.config.vocab_size, device=tokens.device)
    steps = torch.zeros(B, T, dtype=torch.int64, device=tokens.device)
    rows = torch.arange(B, device=tokens.device)
    gone = torch.zeros(B, T, dtype=torch.bool, device=tokens.device)
    watch = Watch(rule)
    for i in range(most):
        new = model.iterate(core, i + 1)
        z = model.logits(model.finish(new)) if rule.hears else None
        leaves = watch.leaves(new.state, core.state, z) | gone
        core = replace(new, state=torch.where(gone[..., None], core.state, new.state))
        if rule.by != "confidence":
            leaves = leaves.cumprod(1).bool()
        if i == most - 1:
            leaves = torch.ones_like(leaves)
        now = leaves & ~gone
        if not now.any():
            continue
        z = model.logits(model.finish(new)) if z is None else z
        logits[rows[now.nonzero()[:, 0]], now.nonzero()[:, 1]] = z[now]
        steps[rows[now.nonzero()[:, 0]], now.nonzero()[:, 1]] = i + 1
        gone = gone | leaves
        going = (~gone).any(1).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(rows):
            rows, gone, core = rows[going], gone[going], core.select_rows(going)
            watch.keep(going)
    return logits, steps


@torch.no_grad()
def read_next(
    model: GPT, tokens: Tensor, cache: KVCache, rule: ExitRule, most: int, keys: Tensor
) -> tuple[Tensor, list[int]]:
    """One new token a row, (B, 1): logits, (B, V), and iterations of each.

    A row that leaves is taken out of the computation, so that a batch costs what its rows cost and
    gives what each gives alone. Its keys and values stay those of its last iteration, in a cache
    that keeps more of them in the later ones' place too.
    Raises ValueError if the model has no core, `most` is below 1 or the cache cannot be followed by
    these tokens, see check_continuation.
    """
    check_continuation(model.config, tokens, cache, model.iterations(most))
    if tokens.shape[1] != 1:
        raise ValueError(f"tokens are {tuple(tokens.shape)}; expected (B, 1), one of each row")
    core = model.begin(tokens, cache, keys)
    rows = list(range(len(tokens)))  # of the batch, those still in the core
    logits = torch.empty(len(rows), model.config.vocab_size, device=tokens.device)
    steps, watch, work = [most] * len(rows), Watch(rule), cache
    ended = torch.empty_like(core.state[:, 0])
    for i in range(most):
        new = model.iterate(core, i + 1)
        z = model.logits(model.finish(new)) if rule.hears else None
        leaves = watch.leaves(new.state, core.state, z)[:, 0].tolist()
        leaving = [n for n, out in enumerate(leaves) if out or i == most - 1]
        core = new
        if not leaving:
            continue
        theirs = [rows[n] for n in leaving]
        staying = [n for n in range(len(rows)) if n not in set(leaving)]
        if z is not None:
            told, source, mine = z[leaving], work, leaving
        else:  # the coda has yet to run, of those that leave
            source, mine = work.select_rows(leaving) if staying else work, list(range(len(leaving)))
            told = model.logits(model.finish(core.select_rows(leaving, source)))
        for n, row in enumerate(theirs):
            logits[row], steps[row], ended[row] = told[n, 0], i + 1, core.state[leaving[n], 0]
        if source is not cache:
            source.copy_newest(cache, mine, theirs)
        cache.repeat_iteration(theirs, i)
        if not staying:
            break
        index = torch.tensor(staying, device=tokens.device)
        watch.keep(index)
        work = work.select_rows(staying)
        core = core.select_rows(index, work)
        rows = [rows[n] for n in staying]
    if cache.warm:
        cache.state = model.carried(ended)
    cache.advance(1)
    return logits, steps
