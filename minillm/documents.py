"""Which text is where: files, folders, patterns or the standard library, as a stream of documents.

A document is one text file, one line of a .jsonl file or one row of a .parquet file. Only one is
in memory at a time. What this room does not do: split, tokenize or write anything.

Text is UTF-8. A byte order mark at its start is stripped, line ends stay as they are, and documents
of nothing but white space are left out. Folders are read recursively, without hidden names, without
following links to folders, and in the order of their POSIX paths, the same on every machine.
"""

import glob
import gzip
import json
import os
import platform
import stat
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import ELOOP, ENAMETOOLONG
from pathlib import Path

from minillm.errors import CorruptError, UnavailableError, UsageError
from minillm.pickles import refuse_pickle

# What counts as text in a folder; a file named one by one may have any ending.
TEXT_ENDINGS = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".css"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".js", ".ts", ".java", ".go"),
    *(".rs", ".rb", ".php", ".sh", ".sql", ".lua", ".swift", ".kt", ".scala", ".hs", ".r", ".jl"),
)
ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
# Parts of the standard library that distributions strip, or that hold other people's packages.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")
)
NOT_TEXT = {
    b"\xff\xfe\0\0": "UTF-32; convert it to UTF-8, e.g. with iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16; convert it to UTF-8, e.g. with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it to UTF-8, e.g. with iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "gzip data; unpack it first (only .jsonl.gz is read packed)",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd data; unpack it first",
    b"\x7fELF": "a binary program, not text",
    b"%PDF": "a PDF; extract its text first",
}


@dataclass(frozen=True)
class Document:
    """One text, and the name (file, or file:row) to use when something is wrong with it."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """The files of a corpus in reading order; `lenient` passes over files that are not UTF-8."""

    description: str
    files: tuple[Path, ...]
    lenient: bool = False

    def documents(self, errors: str = "strict") -> Iterator[Document]:
        """Stream the documents; errors: what to do with bytes that are not UTF-8.

        "strict" refuses, naming file and byte offset; "replace" puts U+FFFD in their place.
        """
        if errors not in ("strict", "replace"):
            raise UsageError(f"--errors {errors}: expected strict or replace")
        for path in self.files:
            try:
                for document in _read(path, errors):
                    if document.text and not document.text.isspace():
                        yield document
            except FileNotFoundError:
                raise UsageError(f"{shown(path)}: disappeared while it was being read") from None
            except UsageError:
                if not self.lenient:
                    raise
            except OSError as error:
                error.filename = error.filename or str(path)  # a failed read names no file
                raise


def find(paths: Sequence[str] | None) -> Source:
    """Find the files that `paths` (files, folders, glob patterns) stand for.

    None is the default corpus: the .py files of the running Python's standard library, without
    SKIPPED_FOLDERS. A file that is named twice is read once, at its first place.
    """
    if not paths:
        return _standard_library()
    files: dict[Path, Path] = {}
    for word in paths:
        for path in _expand(word):
            files.setdefault(path.resolve(), path)
    return Source(", ".join(shown(path) for path in paths), tuple(files.values()))


def shown(path: str | Path) -> str:
    """The path as it stands in a message: its end only, when it would fill the whole line."""
    text = os.fspath(path)
    return text if len(text) <= 120 else "..." + text[-117:]


def _standard_library() -> Source:
    folder = Path(sysconfig.get_path("stdlib"))
    files = _walk(folder, (".py",), SKIPPED_FOLDERS) if folder.is_dir() else []
    if not files:
        raise UsageError(f"{shown(folder)}: no standard library source here; pass --data PATH")
    version = platform.python_version()
    return Source(f"the standard library of Python {version} ({folder})", tuple(files), True)


def _expand(word: str) -> list[Path]:
    if not word or "\0" in word:
        raise UsageError(f"{word!r} is not a path")
    if glob.has_magic(word) and not os.path.lexists(word):
        # Path.glob takes no absolute patterns.
        matches = sorted(glob.glob(word, recursive=True))  # noqa: PTH207
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise UsageError(f"{shown(word)}: no file matches this pattern")
        return files
    path = Path(word)
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        files = _walk(path, TEXT_ENDINGS + ROW_ENDINGS, frozenset())
        if not files:
            raise UsageError(f"{shown(path)}: no text in this folder; .txt, .md, .py, .jsonl ...?")
        return files
    if not stat.S_ISREG(mode):
        raise UsageError(f"{shown(path)}: not a regular file; copy what it holds to a file first")
    refuse_pickle(path, "text")
    return [path]


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{shown(path)}: no such file or folder") from None
    except OSError as error:
        if error.errno in (ELOOP, ENAMETOOLONG):
            raise UsageError(f"{shown(path)}: {error.strerror}") from None
        raise


def _walk(folder: Path, endings: tuple[str, ...], skipped: frozenset[str]) -> list[Path]:
    files = []
    for at, inner, names in os.walk(folder, onerror=_raise):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in skipped]
        for name in names:
            path = Path(at, name)
            is_text = name.lower().endswith(endings) and not name.startswith(".")
            if is_text and path.is_file():
                files.append(path)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _raise(error: OSError) -> None:
    raise error


def _read(path: Path, errors: str) -> Iterator[Document]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(path, errors)
    elif name.endswith(".parquet"):
        yield from _parquet_rows(path)
    else:
        yield Document(str(path), _decode(path.read_bytes(), shown(path), errors))


def _decode(data: bytes, where: str, errors: str) -> str:
    for start, what in NOT_TEXT.items():
        if data.startswith(start):
            raise UsageError(f"{where}: is {what}")
    nul = data.find(b"\0")
    if nul >= 0:
        raise UsageError(f"{where}: NUL byte at offset {nul}: binary, not text")
    try:
        return data.decode("utf-8", errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise UsageError(
            f"{where}: byte 0x{byte:02x} at offset {error.start} is not UTF-8; "
            "convert the file or pass --errors replace"
        ) from None


def _json_lines(path: Path, errors: str) -> Iterator[Document]:
    open_file = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with open_file(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{shown(path)}:{number}"
                if line.strip():
                    yield Document(where, _json_text(line, where, errors))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorruptError(f"{shown(path)}: damaged gzip data ({error})") from None


def _json_text(line: bytes, where: str, errors: str) -> str:
    try:
        row = json.loads(_decode(line, where, errors))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{where}: not a JSON object ({error})") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UsageError(f'{where}: expected a JSON object with a string under "text"')
    try:
        # "\ud800" is valid JSON but half a character: no UTF-8 can hold it.
        return text.encode("utf-8", errors).decode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: half a surrogate pair at character {error.start} of the text; "
            "mend it or pass --errors replace"
        ) from None


def _parquet_rows(path: Path) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UnavailableError(
            f"{shown(path)}: reading .parquet needs pyarrow: pip install pyarrow"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UsageError(f'{shown(path)}: no column "text"')
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise UsageError(f"{shown(path)}:{number}: the row has no text")
                    yield Document(f"{shown(path)}:{number}", text)
    except ArrowException as error:
        raise CorruptError(f"{shown(path)}: damaged parquet file ({error})") from None
