"""Decode bytes as text, in UTF-8 or a named encoding, and explain bytes that are not text."""

import os
from pathlib import Path

from minillm.errors import UsageError, parameter
from minillm.runtime.encodings import is_utf8

ERRORS = ("strict", "replace")
ORDER_MARKS = {
    b"\xff\xfe\0\0": f"UTF-32; convert it to UTF-8 or pass {parameter('encoding')} utf-32",
    b"\xff\xfe": f"UTF-16; convert it to UTF-8 or pass {parameter('encoding')} utf-16",
    b"\xfe\xff": f"UTF-16; convert it to UTF-8 or pass {parameter('encoding')} utf-16",
}
NOT_TEXT = {
    b"\x1f\x8b": "gzip data; unpack it first, or let its name end in .gz",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd data; unpack it first",
    b"\xfd7zXZ\0": "xz data; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x7fELF": "a binary program, not text",
    b"%PDF-": "a PDF; let its name end in .pdf",
    b"{\\rtf": "RTF; save it as .docx or plain text",
    b"\xd0\xcf\x11\xe0": (
        "an Office document with a password, or an old one; save it as .docx without a password, "
        "or as plain text"
    ),
}


def refuse_others(data: bytes, where: str, but: bytes = b"") -> None:
    """Raise UsageError if data begins like a kind of file that is not text.

    data: content of a file
    where: its name for messages
    but: first bytes that are allowed
    """
    for start, what in NOT_TEXT.items():
        if start != but and data.startswith(start):
            raise UsageError(f"{where}: is {what}")


def shown(path: str | Path) -> str:
    """Return a path for a message, shortened to its end if it is very long."""
    text = os.fspath(path)
    return text if len(text) <= 120 else "..." + text[-117:]


def decode(data: bytes, where: str, errors: str = "strict", encoding: str = "utf-8") -> str:
    """Return the text of some bytes, without a byte order mark.

    data: the bytes
    where: the file, or file:row, for messages
    errors: "strict" raises UsageError, which names the byte; "replace" puts U+FFFD in its place
    encoding: name of an encoding, see check_encoding
    """
    utf8 = is_utf8(encoding)
    for start, what in ORDER_MARKS.items():
        if utf8 and data.startswith(start):
            raise UsageError(f"{where}: is {what}")
    refuse_others(data, where)
    nul = data.find(b"\0") if utf8 else -1
    if nul >= 0:
        raise UsageError(f"{where}: NUL byte at offset {nul}: binary, not text")
    try:
        text = data.decode(encoding, errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: {_about(error, data, encoding)}") from None
    except UnicodeError as error:  # some codecs do not give the position
        raise UsageError(f"{where}: is not {encoding} ({error})") from None
    if not utf8 and "\0" in text:
        raise UsageError(f"{where}: holds NUL characters as {encoding}; is that its encoding?")
    return text if utf8 else whole_characters(text, where, errors)


def _about(error: UnicodeDecodeError, data: bytes, encoding: str) -> str:
    byte, utf8 = data[error.start], is_utf8(encoding)
    name, errors = parameter("encoding"), parameter("errors")
    what = f"byte 0x{byte:02x} at offset {error.start} is not {'UTF-8' if utf8 else encoding}"
    if not utf8:
        return f"{what}; name another {name} or pass {errors} replace"
    if 0x91 <= byte <= 0x97 or _like_windows(data):
        return f"{what}; it looks like Windows text: pass {name} cp1252 or {errors} replace"
    return f"{what}; convert the file, name its {name} or pass {errors} replace"


def _like_windows(data: bytes) -> bool:
    """Return whether bytes are likely to be cp1252.

    Few bytes are not ASCII, as in Latin scripts, and some of these are the curly quotes and dashes
    of Windows, which Latin-1 does not have.
    """
    others = data.translate(None, bytes(range(128)))
    return len(others) <= len(data) / 3 and any(byte in others for byte in range(0x91, 0x98))


def whole_characters(text: str, where: str, errors: str = "strict") -> str:
    """Return text that UTF-8 can encode: without half a surrogate pair.

    text: the text
    where: its name for messages
    errors: "strict" raises UsageError on half a pair, "replace" puts a question mark in its place
    """
    try:
        return text.encode("utf-8", errors).decode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: half a surrogate pair at character {error.start} of the text; "
            f"correct it or pass {parameter('errors')} replace"
        ) from None


def refuse_surrogates(text: str) -> None:
    """Raise UsageError if a text, such as a prompt, holds half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text is not valid Unicode: half a character at position {error.start}"
        ) from None
