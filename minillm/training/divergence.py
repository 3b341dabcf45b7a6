"""Which steps must not be taken: their gradient is not finite, or far beyond its own history.

    left out      the loss or the norm is not finite; the norm is above LARGEST; or it is a spike:
                  FACTOR times the median of the last WINDOW steps' norms, and SIGMAS deviations
                  above the mean of their logarithms
    hopeless      IN_A_ROW of them, or more than SHARE of the last RECENT steps: the run goes back
                  to a checkpoint and skips the data, ROLLBACKS times at most

Source: Chowdhery et al. 2022, arXiv:2204.02311, section 5.1 (back to a checkpoint, other data).
What this room does not do: look at tensors, write files (mishaps.py).
"""

import math
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev

WINDOW, ENOUGH = 128, 32  # norms that are remembered; how many before a spike can be told
LARGEST = 1e18  # its square, which AdamW keeps, still fits fp32
FACTOR, SIGMAS = 10.0, 6.0
IN_A_ROW, RECENT, SHARE = 10, 1000, 0.01
ROLLBACKS = 3


@dataclass
class Guard:
    """norms: the last gradient norms, of finite ones.    seen: steps judged.    left_out: which of
    the last RECENT.    in_a_row: left out since the last step taken.    rollbacks: so far.

    All of it is JSON, and saved with each checkpoint.
    """

    norms: list[float] = field(default_factory=list)
    seen: int = 0
    left_out: list[int] = field(default_factory=list)
    in_a_row: int = 0
    rollbacks: int = 0

    def objection(self, loss: float, norm: float) -> str | None:
        """Why the step of this loss and gradient norm must be left out; None: it may be taken."""
        why = self._reason(loss, norm)
        self.seen += 1
        self.in_a_row = self.in_a_row + 1 if why else 0
        self.left_out = [n for n in self.left_out if n > self.seen - RECENT]
        if why:
            self.left_out.append(self.seen)
        if math.isfinite(loss) and norm <= LARGEST:  # spikes too: what stays so is soon none
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
    def usual(self) -> float | None:
        """The median of the remembered norms."""
        return median(self.norms) if self.norms else None

    @property
    def hopeless(self) -> bool:
        """Whether so many steps were left out that going on makes no sense."""
        return self.in_a_row >= IN_A_ROW or len(self.left_out) > SHARE * RECENT

    def rolled_back(self, past: "Guard") -> "Guard":
        """The state to go on with from a checkpoint that held `past`: its history, a fresh count,
        one roll-back more than there have been.
        """
        return Guard(past.norms, past.seen, rollbacks=self.rollbacks + 1)
