"""Early exit: let each token leave the core of a recurrent model as soon as a rule allows it.

    confidence   the most likely token has a probability above the threshold
    kl           the distribution hardly changes: KL(before || now) is below the threshold
    latent       the state hardly changes: |s - before| / |s| is below the threshold

The rule must hold in patience + 1 iterations in a row; it is computed in fp32. Confidence and kl
cost the coda and the head in every iteration. Latent costs them once for a token that is read
alone; if all tokens are read at once, it costs them in the iterations in which some tokens leave.

A token that waits for an earlier one stands still and looks settled. If all tokens are read at
once, kl and latent therefore let a token leave only after all earlier ones have left. Confidence
need not wait, but needs patience (3 was right where 0 was wrong).
Source: Geiping et al. 2025, arXiv:2502.05171, section 6.1, for kl and latent.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minillm.config.sampling import ExitRule
from minillm.model.gpt import GPT
from minillm.model.inputs import check_continuation
from minillm.model.kv_cache import KVCache


class ExitTracker:
    """Counts of the iterations in a row in which each token has met an exit rule."""

    def __init__(self, rule: ExitRule) -> None:
        self.rule = rule
        self.held: Tensor | None = None
        self.logp: Tensor | None = None

    def update(self, s: Tensor, before: Tensor, logits: Tensor | None) -> Tensor:
        """Return which tokens may leave after an iteration, (B, T) bool.

        s: (B, T, C) states after the iteration
        before: (B, T, C) states before it
        logits: (B, T, V), if the rule needs them
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
                # Between equal distributions, rounding may give less than zero.
                met = (old.exp() * (old - logp)).sum(-1).clamp(min=0) < rule.threshold
            self.logp = logp
        held = torch.zeros_like(met, dtype=torch.int64) if self.held is None else self.held
        self.held = torch.where(met, held + 1, 0)
        return self.held > rule.patience

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows except `rows`."""
        self.held = self.held[rows]
        self.logp = None if self.logp is None else self.logp[rows]


@torch.no_grad()
def read(
    model: GPT, tokens: Tensor, rule: ExitRule, most: int, keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Read all tokens at once; return logits, (B, T, V), and iterations of each token, (B, T).

    A token that has left keeps its state, which later tokens still attend to. A row whose tokens
    have all left is no longer computed.

    model: a decoder with a core
    tokens: (B, T) int64
    rule: rule by which a token may leave
    most: iterations after which all tokens leave
    keys: (B,) int64 keys of the start states; default: zeros

    Raises ValueError if the model has no core, or if `most` is below 1.
    """
    model.iterations(most)
    core = model.begin(tokens, None, keys)
    B, T = tokens.shape
    logits = torch.empty(B, T, model.config.vocab_size, device=tokens.device)
    steps = torch.zeros(B, T, dtype=torch.int64, device=tokens.device)
    rows = torch.arange(B, device=tokens.device)
    gone = torch.zeros(B, T, dtype=torch.bool, device=tokens.device)
    tracker = ExitTracker(rule)
    for i in range(most):
        new = model.iterate(core, i + 1)
        z = model.logits(model.finish(new)) if rule.needs_logits else None
        leaves = tracker.update(new.state, core.state, z) | gone
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
        inside = (~gone).any(1).nonzero()[:, 0]
        if not len(inside):
            break
        if len(inside) < len(rows):
            rows, gone, core = rows[inside], gone[inside], core.select_rows(inside)
            tracker.keep_rows(inside)
    return logits, steps


@torch.no_grad()
def read_next(
    model: GPT, tokens: Tensor, cache: KVCache, rule: ExitRule, most: int, keys: Tensor
) -> tuple[Tensor, list[int]]:
    """Read one new token of each row; return logits, (B, V), and the iterations of each row.

    A row that leaves is taken out of the computation, so that a batch costs what its rows cost and
    gives what each gives alone. The keys and values of its last iteration also stand in for those
    of the later iterations, in a cache that keeps more than one.

    model: a decoder with a core
    tokens: (B, 1) int64
    cache: keys and values of the tokens before
    rule: rule by which a row may leave
    most: iterations after which all rows leave
    keys: (B,) int64 keys of the start states

    Raises ValueError if the model has no core, if `most` is below 1, or if these tokens cannot
    follow those of the cache, see check_continuation.
    """
    check_continuation(model.config, tokens, cache, model.iterations(most))
    if tokens.shape[1] != 1:
        raise ValueError(f"tokens are {tuple(tokens.shape)}; expected (B, 1), one of each row")
    core = model.begin(tokens, cache, keys)
    rows = list(range(len(tokens)))  # rows of the batch that are still in the core
    logits = torch.empty(len(rows), model.config.vocab_size, device=tokens.device)
    steps, tracker, work = [most] * len(rows), ExitTracker(rule), cache
    last_states = torch.empty_like(core.state[:, 0])
    for i in range(most):
        new = model.iterate(core, i + 1)
        z = model.logits(model.finish(new)) if rule.needs_logits else None
        may_leave = tracker.update(new.state, core.state, z)[:, 0].tolist()
        leaving = [n for n, leaves in enumerate(may_leave) if leaves or i == most - 1]
        core = new
        if not leaving:
            continue
        theirs = [rows[n] for n in leaving]
        staying = [n for n in range(len(rows)) if n not in set(leaving)]
        source, mine = work, leaving
        if z is not None:
            found = z[leaving]
        else:  # the coda has yet to run, for the rows that leave
            if staying:
                source, mine = work.select_rows(leaving), list(range(len(leaving)))
            found = model.logits(model.finish(core.select_rows(leaving, source)))
        for n, row in enumerate(theirs):
            logits[row], steps[row] = found[n, 0], i + 1
            last_states[row] = core.state[leaving[n], 0]
        if source is not cache:
            source.copy_newest(cache, mine, theirs)
        cache.repeat_iteration(theirs, i)
        if not staying:
            break
        index = torch.tensor(staying, device=tokens.device)
        tracker.keep_rows(index)
        work = work.select_rows(staying)
        core = core.select_rows(index, work)
        rows = [rows[n] for n in staying]
    if cache.warm:
        cache.state = model.carried(last_states)
    cache.advance(1)
    return logits, steps
