"""Read and write text as UTF-8 in any locale, and escape control characters on a terminal."""

import codecs
import io
import sys
import unicodedata
from typing import TextIO

# Characters that reverse the direction of text, so that a line can appear to say something else.
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def use_utf8() -> None:
    """Make the standard streams read and write UTF-8, without errors on any character.

    A terminal with another encoding than ASCII keeps it, as it shows that encoding.
    """
    codecs.register_error("minillm.replace", lambda error: _bytes_or(error, "replace"))
    codecs.register_error("minillm.escape", lambda error: _bytes_or(error, "backslashreplace"))
    for name, errors in (
        ("stdin", "surrogateescape"),
        ("stdout", "minillm.replace"),
        ("stderr", "minillm.escape"),
    ):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            own = codecs.lookup(stream.encoding).name
            keeps = stream.isatty() and own != "ascii"
            stream.reconfigure(encoding=own if keeps else "utf-8", errors=errors)


def _bytes_or(error: UnicodeError, handler: str) -> tuple[str | bytes, int]:
    """Encode undecoded bytes as the UTF-8 text that they are, or else as `handler` does."""
    text = error.object[error.start : error.end]
    if isinstance(error, UnicodeEncodeError) and not _has_surrogates(proper := decoded(text)):
        try:
            return proper.encode(error.encoding), error.end
        except UnicodeEncodeError:
            pass
    return codecs.lookup_error(handler)(error)


def decoded(text: str) -> str:
    """Return text of the command line, or a file's name, with its bytes decoded as UTF-8.

    In a locale in which all text is ASCII, Python keeps other bytes as surrogates. A path needs
    them to be opened, a prompt must not have them. Bytes that are not UTF-8 stay surrogates.
    """
    if not _has_surrogates(text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # other surrogates, which do not stand for bytes
        return text


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def visible(text: str, stream: TextIO) -> str:
    """Return text in the form for a stream: unchanged unless the stream is a terminal.

    On a terminal control characters are written as escapes such as \\x1b, so that they cannot move
    the cursor, ring, set the title or hide text. Line breaks and tabs are kept.

    text: the text
    stream: stream that it will be written to
    """
    if not stream.isatty():
        return text
    return "".join(c.encode("unicode_escape").decode() if _acts(c) else c for c in decoded(text))


def _acts(c: str) -> bool:
    return c not in "\n\t" and (unicodedata.category(c) == "Cc" or c in TURNING)


def say(text: str, stream: TextIO | None = None) -> None:
    """Write a line and flush the stream.

    text: the line
    stream: the stream; standard error by default
    """
    stream = sys.stderr if stream is None else stream
    print(visible(text, stream), file=stream, flush=True)
