"""What state.json must hold before any of it is used. Its digest tells only that it is whole.

What this room does not do: know what the numbers are for (training.py).
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from minillm.errors import CorruptError

LONGEST = 1 << 53  # steps, tokens: what a float can count


def _is_count(x: Any) -> bool:
    return type(x) is int and 0 <= x < LONGEST


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < float("inf")


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or fits(x)


def _is_pace(x: Any) -> bool:
    """Knots (step, progress), their steps rising, as schedule.Schedule has them."""
    knots = isinstance(x, list) and all(
        isinstance(k, list) and len(k) == 2 and _is_count(k[0]) and _is_number(k[1]) for k in x
    )
    return knots and len(x) >= 2 and all(a[0] < b[0] for a, b in zip(x, x[1:], strict=False))


def _is_shapes(x: Any) -> bool:
    return isinstance(x, dict) and all(
        isinstance(shape, list) and all(map(_is_count, shape)) for shape in x.values()
    )


def _is_dict(x: Any) -> bool:
    return isinstance(x, dict)


# "progress.step": the field `step` of the field `progress`.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "shapes": _is_shapes,
    "model": _is_dict,
    "settings": _is_dict,
    "pace": _is_pace,
    "scale": _or_none(_is_dict),
    "scale.value": lambda x: _is_number(x) and x > 0,
    "scale.good": _is_count,
    "progress": _is_dict,
    "progress.step": _is_count,
    "progress.tokens": _is_count,
    "progress.trained_s": lambda x: _is_number(x) and x >= 0,
    "progress.best_loss": _or_none(_is_number),
    "progress.best_step": _or_none(_is_count),
    "progress.evaluations_without_gain": _is_count,
    "progress.skipped": _is_count,
    "progress.ended": lambda x: type(x) is bool,
    "timed_from": lambda x: _is_number(x) and x >= 0,
    "launch": _or_none(lambda x: type(x) is str),
    "guard": _is_dict,
    "guard.norms": lambda x: isinstance(x, list) and all(_is_number(n) and n >= 0 for n in x),
    "guard.seen": _is_count,
    "guard.left_out": lambda x: isinstance(x, list) and all(map(_is_count, x)),
    "guard.in_a_row": _is_count,
    "guard.rollbacks": _is_count,
    "fixed": _is_dict,
    "fixed.threads": lambda x: _is_count(x) and 0 < x <= 4096,
    "fixed.dtype": lambda x: x in ("fp32", "bf16", "fp16"),
    "fixed.micro_batch_size": lambda x: _is_count(x) and x > 0,
    "fixed.ranks": lambda x: _is_count(x) and x > 0,
}


# Without these nothing can go on.
RESUMED = (
    "settings", "pace", "progress.step", "progress.tokens", "progress.trained_s", "fixed.threads",
    "fixed.dtype", "fixed.micro_batch_size",
)  # fmt: skip


def check_state(path: Path, state: dict[str, Any], needed: Collection[str] = ()) -> None:
    """Raise CorruptError, naming the file, unless the fields there are what they must be.

    needed: fields of FIELDS that must be there.
    """
    for name, fits in FIELDS.items():
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
