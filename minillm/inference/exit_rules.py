"""Rules for early exit: by which quantity a token may leave the core. How they work: exits.py."""

from dataclasses import dataclass

from minillm.errors import UsageError

LONGEST = 4096  # iterations of patience, as many as anything runs
DEFAULTS = {"confidence": (0.9, 3), "kl": (5e-4, 1), "latent": (0.03, 1)}  # threshold, patience


@dataclass(frozen=True)
class ExitRule:
    """When a token leaves the core. Raises UsageError on what cannot be."""

    by: str
    threshold: float
    patience: int

    def __post_init__(self) -> None:
        if self.by not in DEFAULTS:
            raise UsageError(f"exit by {self.by!r}: expected one of {', '.join(DEFAULTS)}")
        if self.by == "confidence" and not 0 <= self.threshold <= 1:
            raise UsageError(f"exit threshold {self.threshold:g}: a confidence is from 0 to 1")
        if not 0 <= self.threshold < float("inf"):
            raise UsageError(f"exit threshold {self.threshold:g}: expected 0 or more")
        if not 0 <= self.patience <= LONGEST:
            raise UsageError(f"exit patience {self.patience}: expected 0 to {LONGEST}")

    @property
    def hears(self) -> bool:
        """Whether it decides by logits."""
        return self.by != "latent"


def exit_rule(by: str | None, threshold: float | None, patience: int | None) -> ExitRule | None:
    """The rule of these options, those left out as DEFAULTS has them; None if there are none."""
    if by is None:
        if threshold is not None or patience is not None:
            raise UsageError("--exit-threshold and --exit-patience are of --exit-by; add it")
        return None
    usual = DEFAULTS.get(by, (0.0, 0))
    return ExitRule(by, usual[0] if threshold is None else threshold,
                    usual[1] if patience is None else patience)  # fmt: skip
