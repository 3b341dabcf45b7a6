"""Bytes to text: UTF-8 or a named encoding, and plain words about bytes that are neither.

This module does not open files or know formats (documents.py, rows.py, formats.py).
"""

import os
from pathlib import Path

from minillm.errors import UsageError
from minillm.runtime.encodings import is_utf8

ERRORS = ("strict", "replace")
ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32; convert it to UTF-8 or pass --encoding utf-32",
    b"\xff\xfe": "UTF-16; convert it to UTF-8 or pass --encoding utf-16",
    b"\xfe\xff": "UTF-16; convert it to UTF-8 or pass --encoding utf-16",
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
    """Raise UsageError if `data` begins as a kind of file does that is no text.

    but: the beginning that is expected.
    """
    for start, what in NOT_TEXT.items():
        if start != but and data.startswith(start):
            raise UsageError(f"{where}: is {what}")


def shown(path: str | Path) -> str:
    """Return the path for a message: its end only, when it would fill the whole line."""
    text = os.fspath(path)
    return text if len(text) <= 120 else "..." + text[-117:]


def decode(data: bytes, where: str, errors: str = "strict", encoding: str = "utf-8") -> str:
    """Return the text of `data`, without a byte order mark.

    where: the file, or file:row, for messages.
    errors: "strict" raises UsageError naming the byte; "replace" puts U+FFFD in its place.
    encoding: a name that check_encoding lets pass.
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
    except UnicodeError as error:  # some codecs do not say where
        raise UsageError(f"{where}: is not {encoding} ({error})") from None
    if not utf8 and "\0" in text:
        raise UsageError(f"{where}: holds NUL characters as {encoding}; is that its encoding?")
    return text if utf8 else whole_characters(text, where, errors)


def _about(error: UnicodeDecodeError, data: bytes, encoding: str) -> str:
    byte, utf8 = data[error.start], is_utf8(encoding)
    what = f"byte 0x{byte:02x} at offset {error.start} is not {'UTF-8' if utf8 else encoding}"
    if not utf8:
        return f"{what}; name another --encoding or pass --errors replace"
    if 0x91 <= byte <= 0x97 or _like_windows(data):
        return f"{what}; it looks like Windows text: pass --encoding cp1252 or --errors replace"
    return f"{what}; convert the file, name its --encoding or pass --errors replace"


def _like_windows(data: bytes) -> bool:
    """Return whether bytes are likely to be of cp1252: few are not ASCII, as in Latin scripts, and
    some of these are the curly quotes and dashes of Windows, where Latin-1 has nothing.
    """
    others = data.translate(None, bytes(range(128)))
    return len(others) <= len(data) / 3 and any(byte in others for byte in range(0x91, 0x98))


def whole_characters(text: str, where: str, errors: str = "strict") -> str:
    """Return `text`, or raise UsageError if it holds half a surrogate pair, which UTF-8 cannot.

    errors: "replace" puts a question mark in its place.
    """
    try:
        return text.encode("utf-8", errors).decode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: half a surrogate pair at character {error.start} of the text; "
            "mend it or pass --errors replace"
        ) from None


def refuse_surrogates(text: str) -> None:
    """Raise UsageError if a text, such as a prompt, holds half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text is not valid Unicode: half a character at position {error.start}"
        ) from None
