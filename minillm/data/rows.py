"""Read files of rows, in which each row is a document: .jsonl, .json and .parquet.

.jsonl and .json may be packed as .gz. documents.py decides which files are read.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minillm.data.plain_text import decode, shown, whole_characters
from minillm.errors import CorruptError, UnavailableError, UsageError, parameter

GIVE_TEXT = "take the row out, or give it a text"


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, unpacked if its name ends in .gz; CorruptError on damage."""
    if not path.name.lower().endswith(".gz"):
        return path.read_bytes()
    with opened(path) as file:
        return file.read()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file to read its bytes, unpacked if its name ends in .gz."""
    packed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorruptError(f"{shown(path)}: damaged gzip data ({error})") from None


def json_lines(
    path: Path, column: str, errors: str, encoding: str = "utf-8"
) -> Iterator[tuple[str, str]]:
    """Stream (file:line, text) of a file with one JSON row on each line.

    path: the file
    column: column with the text
    errors: "strict" or "replace", for bytes that are invalid in the encoding
    encoding: encoding of the file
    """
    with opened(path) as file:
        wide = "\n".encode(encoding) != b"\n"  # UTF-16 and others have different line ends
        lines = decode(file.read(), shown(path), errors, encoding).split("\n") if wide else file
        for number, line in enumerate(lines, 1):
            where = f"{shown(path)}:{number}"
            if line.strip():
                text = line if wide else decode(line, where, errors, encoding)
                yield where, _text_of(_parse(text, where), where, column, errors)


def json_rows(
    path: Path, column: str, errors: str, encoding: str = "utf-8"
) -> Iterator[tuple[str, str]]:
    """Stream (file:row, text) of a .json file: an array of rows, or one row on each line.

    Any other JSON is one document, unchanged. Raises UsageError if an array is damaged.

    path: the file
    column: column with the text
    errors: "strict" or "replace", for bytes that are invalid in the encoding
    encoding: encoding of the file
    """
    text = decode(read_bytes(path), shown(path), errors, encoding)
    kind, rows = _json_kind(text, shown(path))
    if kind == "lines":
        yield from json_lines(path, column, errors, encoding)
    elif kind == "array":
        for number, row in enumerate(rows, 1):
            where = f"{shown(path)}:{number}"
            yield where, _text_of(row, where, column, errors)
    else:
        yield str(path), text


def is_table(path: Path, column: str | None, encoding: str = "utf-8") -> bool:
    """Return whether a .json file holds rows, which are objects or texts.

    path: the file
    column: if it is not None, rows must be objects with a text in this column
    encoding: encoding of the file
    """
    try:
        text = decode(read_bytes(path), "", "replace", encoding)
        kind, rows = _json_kind(text, "")
    except (UsageError, CorruptError):
        return False
    if kind == "text" or column is None:
        return kind != "text"
    return isinstance(rows[0], dict) and isinstance(rows[0].get(column), str)


def _json_kind(text: str, where: str) -> tuple[str, list]:
    """Return ("array", its rows), ("lines", [the first row]) or ("text", [])."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UsageError(f"{where}: an array of rows, but not valid JSON ({error})") from None
        try:
            first = json.loads(text.strip().partition("\n")[0])
        except (ValueError, RecursionError):
            return "text", []
        return ("lines", [first]) if isinstance(first, dict) else ("text", [])
    if isinstance(value, list) and value and isinstance(value[0], dict | str):
        return "array", value
    return "text", []


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not a JSON object ({error})") from None


def _text_of(row: Any, where: str, column: str, errors: str) -> str:
    text = row.get(column) if isinstance(row, dict) else row
    if not isinstance(text, str):
        others = [n for n, v in row.items() if isinstance(v, str)] if isinstance(row, dict) else []
        advice = _hint(others) or f"; {GIVE_TEXT}"
        raise UsageError(f'{where}: expected a JSON object with a string under "{column}"{advice}')
    # "\ud800" is valid JSON but half a character, which UTF-8 cannot encode.
    return whole_characters(text, where, errors)


def _hint(columns: list[str]) -> str:
    names = ", ".join(columns[:3])
    return f"; it has {names}: name one with {parameter('text_column')}" if columns else ""


def parquet_rows(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """Stream (file:row, text) of a parquet file.

    path: the file
    column: column with the text
    Raises UnavailableError if pyarrow is missing.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UnavailableError(
            f'{shown(path)}: reading .parquet needs pyarrow: pip install pyarrow ("minillm'
            '[parquet]")'
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UsageError(f'{shown(path)}: no column "{column}"{_hint(names)}')
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        where = f"{shown(path)}:{number}"
                        raise UsageError(f"{where}: the row has no text; {GIVE_TEXT}")
                    yield f"{shown(path)}:{number}", text
    except ArrowException as error:
        raise CorruptError(f"{shown(path)}: damaged parquet file ({error})") from None
