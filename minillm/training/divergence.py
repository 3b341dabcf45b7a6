"""Decide which steps are skipped because their gradient is not finite or unusually large.

    skipped     the loss or the norm is not finite; the norm is above LARGEST; or it is a spike:
                above FACTOR times the median of the last WINDOW steps' norms, and above the mean of
                their logarithms by more than SIGMAS standard deviations
    diverged    IN_A_ROW steps were skipped in a row, or more than SHARE of the last RECENT steps:
                the run is rolled back to a checkpoint and skips the data (recovery.py), at most
                ROLLBACKS times

Source: Chowdhery et al. 2022, arXiv:2204.02311, section 5.1 (roll back, skip data).
"""

import math
from dataclasses import dataclass
from statistics import fmean, median, pstdev

from minillm.checkpoint.schema import DivergenceHistory

WINDOW = 128  # norms that are remembered
ENOUGH = 32  # norms that are needed to recognise a spike
LARGEST = 1e18  # its square, which AdamW keeps, still fits fp32
FACTOR, SIGMAS = 10.0, 6.0
IN_A_ROW, RECENT, SHARE = 10, 1000, 0.01
ROLLBACKS = 3


@dataclass(kw_only=True)
class DivergenceGuard(DivergenceHistory):
    """Guard of the steps: it keeps their history and decides by it. Saved with each checkpoint."""

    def reason_to_skip(self, loss: float, norm: float) -> str | None:
        """Return why a step must be skipped, in words; None if it may be taken.

        The step is added to the history.

        loss: mean loss of the step, nats per token
        norm: norm of its gradient, before clipping
        """
        why = self._reason(loss, norm)
        self.seen += 1
        self.in_a_row = self.in_a_row + 1 if why else 0
        self.left_out = [n for n in self.left_out if n > self.seen - RECENT]
        if why:
            self.left_out.append(self.seen)
        # Spikes are remembered, too, so that a norm that stays large soon counts as usual.
        if math.isfinite(loss) and norm <= LARGEST:
            self.norms = [*self.norms, norm][-WINDOW:]
        return why

    def _reason(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"loss {loss:g}, gradient norm {norm:.3g}"
        if not math.isfinite(norm):
            return f"gradient norm {norm:g}"
        if norm > LARGEST:
            return f"gradient norm {norm:.3g}, beyond {LARGEST:g}"
        logs = [math.log(n) for n in self.norms if n > 0]
        if len(logs) < ENOUGH or norm <= FACTOR * median(self.norms):
            return None
        if math.log(norm) <= fmean(logs) + SIGMAS * pstdev(logs):
            return None
        return f"gradient norm {norm:.3g}, a spike"

    @property
    def usual_norm(self) -> float | None:
        """Median of the remembered norms; None before the first step."""
        return median(self.norms) if self.norms else None

    @property
    def has_diverged(self) -> bool:
        """True if too many steps were skipped, so that the run must be rolled back."""
        return self.in_a_row >= IN_A_ROW or len(self.left_out) > SHARE * RECENT

    def rolled_back(self, past: "DivergenceGuard") -> "DivergenceGuard":
        """Return the guard to use after a roll-back to a checkpoint that held `past`.

        It has the norms of the checkpoint, no skipped steps, and counts one more roll-back.
        """
        return DivergenceGuard(norms=past.norms, seen=past.seen, rollbacks=self.rollbacks + 1)
