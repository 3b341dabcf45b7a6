"""Names of text encodings: whether Python knows one, and whether it is UTF-8."""

from minillm.errors import UsageError


def check_encoding(name: str) -> None:
    """Raise UsageError if `name` is no encoding of text that Python knows."""
    try:
        "".encode(name)
        b"".decode(name)
    except (LookupError, ValueError):
        raise UsageError(
            f"--encoding {name}: no such encoding; try utf-8, cp1252, latin-1, utf-16 or gb18030"
        ) from None


def is_utf8(encoding: str) -> bool:
    """Whether `encoding` is a name of UTF-8."""
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")
