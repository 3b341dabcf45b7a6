"""Write JSON without NaN and Infinity, which Python writes but the standard does not have."""

import json
import math
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON text with null for each number that is not finite.

    value: what json.dumps takes
    indent: spaces for each level; None for one line
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
