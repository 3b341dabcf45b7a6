"""Check the names of text encodings."""

from minillm.errors import UsageError, parameter


def check_encoding(name: str) -> None:
    """Raise UsageError if Python knows no text encoding of this name."""
    try:
        "".encode(name)
        b"".decode(name)
    except (LookupError, ValueError):
        raise UsageError(
            f"{parameter('encoding')} {name}: no such encoding; try utf-8, cp1252, latin-1, utf-16 "
            "or gb18030"
        ) from None


def is_utf8(encoding: str) -> bool:
    """Return whether this is a name of UTF-8."""
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")
