"""The content of state.json: the records that a run saves, and a rule for every field.

A digest shows that the file is whole. It does not show that its values make sense, so each field is
checked before it is used.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from minillm.errors import CorruptError

LARGEST = 1 << 53  # steps and tokens: the largest whole number that a float can count to


def _is_count(x: Any) -> bool:
    return type(x) is int and 0 <= x < LARGEST


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < float("inf")


def _is_seconds(x: Any) -> bool:
    return _is_number(x) and x >= 0


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or fits(x)


def _is_pace(x: Any) -> bool:
    """Return whether x is a list of knots (step, progress) with rising steps, see Schedule.pace."""
    knots = isinstance(x, list) and all(
        isinstance(k, list) and len(k) == 2 and _is_count(k[0]) and _is_number(k[1]) for k in x
    )
    return knots and len(x) >= 2 and all(a[0] < b[0] for a, b in zip(x, x[1:], strict=False))


def _is_shapes(x: Any) -> bool:
    return isinstance(x, dict) and all(
        isinstance(shape, list) and all(map(_is_count, shape)) for shape in x.values()
    )


def _is_norms(x: Any) -> bool:
    return isinstance(x, list) and all(_is_number(n) and n >= 0 for n in x)


def _is_steps(x: Any) -> bool:
    return isinstance(x, list) and all(map(_is_count, x))


def _is_dict(x: Any) -> bool:
    return isinstance(x, dict)


def _saved(fits: Callable[[Any], bool], needed: bool = False, **default: Any) -> Any:
    """Return a dataclass field that is saved in state.json.

    fits: returns whether a value that was read is valid
    needed: whether a run cannot be resumed without it
    default: `default` or `default_factory` of dataclasses.field
    """
    return field(metadata={"fits": fits, "needed": needed}, **default)


@dataclass(kw_only=True)
class Progress:
    """Progress of a run: step, tokens, best loss. Saved with every checkpoint.

    step: number of steps done, including skipped ones
    tokens: number of tokens read by all ranks
    trained_s: seconds of training, over all processes of the run
    best_loss, best_step: lowest validation loss (nats per token), and the step that reached it
    evaluations_without_gain: evaluations since best_step
    skipped: batches of text that roll-backs have passed over
    ended: whether everything is done, the last evaluation too
    """

    step: int = _saved(_is_count, needed=True, default=0)
    tokens: int = _saved(_is_count, needed=True, default=0)
    trained_s: float = _saved(_is_seconds, needed=True, default=0.0)
    best_loss: float | None = _saved(_or_none(_is_number), default=None)
    best_step: int | None = _saved(_or_none(_is_count), default=None)
    evaluations_without_gain: int = _saved(_is_count, default=0)
    skipped: int = _saved(_is_count, default=0)
    ended: bool = _saved(lambda x: type(x) is bool, default=False)

    @property
    def position(self) -> int:
        """Number of the next batch. Its text and all that is drawn for it are functions of it."""
        return self.step + self.skipped


@dataclass(kw_only=True)
class DivergenceHistory:
    """History by which steps are skipped and a run is rolled back, see training/divergence.py.

    norms: the latest finite gradient norms, the newest last
    seen: steps that were judged
    left_out: numbers of the skipped steps among the latest ones, counted as `seen`
    in_a_row: skipped steps since the last step that was taken
    rollbacks: how often the run was rolled back
    """

    norms: list[float] = _saved(_is_norms, default_factory=list)
    seen: int = _saved(_is_count, default=0)
    left_out: list[int] = _saved(_is_steps, default_factory=list)
    in_a_row: int = _saved(_is_count, default=0)
    rollbacks: int = _saved(_is_count, default=0)


def _rules(name: str, record: type) -> dict[str, Callable[[Any], bool]]:
    """Return the rules of state.json's object `name`, which holds the fields of a dataclass."""
    inner = {f"{name}.{f.name}": f.metadata["fits"] for f in fields(record)}
    return {name: _is_dict, **inner}


# "progress.step": the field `step` of the object `progress`.
RULES: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "shapes": _is_shapes,
    "model": _is_dict,
    "settings": _is_dict,
    "pace": _is_pace,
    "scale": _or_none(_is_dict),
    "scale.value": lambda x: _is_number(x) and x > 0,
    "scale.good": _is_count,
    **_rules("progress", Progress),
    "timed_from": _is_seconds,
    "launch": _or_none(lambda x: type(x) is str),
    **_rules("guard", DivergenceHistory),
    "fixed": _is_dict,
    "fixed.threads": lambda x: _is_count(x) and 0 < x <= 4096,
    "fixed.dtype": lambda x: x in ("fp32", "bf16", "fp16"),
    "fixed.micro_batch_size": lambda x: _is_count(x) and x > 0,
    "fixed.ranks": lambda x: _is_count(x) and x > 0,
}
# A run cannot be resumed without these.
RESUMED = (
    "settings",
    "pace",
    *(f"progress.{f.name}" for f in fields(Progress) if f.metadata["needed"]),
    "fixed.threads",
    "fixed.dtype",
    "fixed.micro_batch_size",
)


def check_state(path: Path, state: dict[str, Any], needed: Collection[str] = ()) -> None:
    """Raise CorruptError if a field of state.json breaks its rule, or a needed one is missing.

    path: the file, for the message
    state: its content
    needed: names of RULES that must be there
    """
    for name, fits in RULES.items():
        outer, _, inner = name.partition(".")
        holder, key = (state.get(outer), inner) if inner else (state, outer)
        if isinstance(holder, dict) and key in holder:
            if not fits(holder[key]):
                raise CorruptError(f"{path}: {name} is {_shown(holder[key])}, which cannot be")
        elif name in needed:
            raise CorruptError(f"{path}: lacks {name}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
