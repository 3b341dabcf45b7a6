"""Find text in files, folders, patterns or the standard library, and stream it as documents.

A document is one file, or one row of a .jsonl, .json or .parquet file. Only one document is in
memory at a time, except that all rows of a .json file are.

Text is UTF-8 or in the encoding that was named. A byte order mark at its start is removed, line
ends are not changed, and documents of only white space are left out. Folders are read recursively,
without hidden files and folders, without following links to folders, and in the order of their
POSIX paths, which is the same on every machine. Folders that minillm made (runs, prepared corpora
and profiles) are not read as part of a folder, nor by a pattern, unless the pattern ends in the
name of a file. Files that are not read are counted.
"""

import glob
import importlib.util
import os
import platform
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from errno import ELOOP, ENAMETOOLONG
from pathlib import Path

from minillm.data import formats, rows
from minillm.data.plain_text import ERRORS, decode, shown
from minillm.data.skipped import (
    BLANK,
    FOLDER,
    HIDDEN,
    LINK,
    NOT_UTF8,
    OURS,
    about_no_match,
    about_skipped,
)
from minillm.errors import UsageError, parameter
from minillm.runtime.encodings import check_encoding, is_utf8
from minillm.runtime.files import naming
from minillm.runtime.ownership import product, product_around
from minillm.runtime.pickles import refuse_pickle

# Endings of text files in a folder. A file that is named itself may have any ending.
TEXT_ENDINGS = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".css"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".js", ".ts", ".java", ".go"),
    *(".rs", ".rb", ".php", ".sh", ".sql", ".lua", ".swift", ".kt", ".scala", ".hs", ".r", ".jl"),
)
ROW_ENDINGS = (".jsonl", ".parquet")
# Endings that are also read with .gz after them.
PACKED = (*TEXT_ENDINGS, ".jsonl", ".json", ".html", ".htm", ".xhtml", ".ipynb")
# Parts of the standard library that distributions leave out, or that hold other packages.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")
)


@dataclass(frozen=True)
class Document:
    """One text.

    name: the file, or file:row, for messages
    text: the text
    start: bytes of the file before the text; None if the text is not a part of the file's bytes
    """

    name: str
    text: str
    start: int | None = None


@dataclass(frozen=True)
class Source:
    """The files of a corpus in reading order.

    description: the paths that the user gave, for messages
    files: the files
    lenient: True to skip files that are not UTF-8
    encoding: encoding of the text
    column: column with the text in the rows of .jsonl, .json and .parquet files
    skipped: number of files and folders that are not read, by ending or as HIDDEN, LINK, FOLDER
        or OURS
    """

    description: str
    files: tuple[Path, ...]
    lenient: bool = False
    encoding: str = "utf-8"
    column: str = "text"
    skipped: Counter[str] = field(default_factory=Counter)

    def documents(
        self, errors: str = "strict", skipped: Counter[str] | None = None
    ) -> Iterator[Document]:
        """Stream the documents.

        errors: "strict" raises UsageError, which names file and byte offset, on bytes that
            are invalid in the encoding; "replace" puts U+FFFD in their place
        skipped: counter to which documents that are BLANK or NOT_UTF8 are added
        """
        if errors not in ERRORS:
            raise UsageError(f"{parameter('errors')} {errors}: expected strict or replace")
        skipped = Counter() if skipped is None else skipped
        for path in self.files:
            try:
                for document in self._read(path, errors):
                    if document.text and not document.text.isspace():
                        yield document
                    else:
                        skipped[BLANK] += 1
            except FileNotFoundError:
                raise UsageError(f"{shown(path)}: disappeared while it was being read") from None
            except UsageError:
                if not self.lenient:
                    raise
                skipped[NOT_UTF8] += 1
            except OSError as error:
                error.filename = error.filename or str(path)  # a failed read names no file
                raise

    def _read(self, path: Path, errors: str) -> Iterator[Document]:
        ending, encoding = ending_of(path.name), self.encoding
        if ending == ".jsonl":
            found = rows.json_lines(path, self.column, errors, encoding)
        elif ending == ".json":
            found = rows.json_rows(path, self.column, errors, encoding)
        elif ending == ".parquet":
            found = rows.parquet_rows(path, self.column)
        elif ending in formats.READERS:
            found = iter([(str(path), formats.text_of(path, ending, errors, encoding))])
        else:
            data = rows.read_bytes(path)
            text = decode(data, shown(path), errors, encoding)
            start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
            return iter([Document(str(path), text, start if is_utf8(encoding) else None)])
        return (Document(name, text) for name, text in found)


def find(paths: Sequence[str] | None, encoding: str = "utf-8", text_column: str = "text") -> Source:
    """Find the files to read.

    paths: files, folders and glob patterns; None for the default corpus, the .py files of the
        running Python's standard library without SKIPPED_FOLDERS. A file that is named twice is
        read once, at its first place.
    encoding: encoding of the text
    text_column: column with the text of files of rows
    Raises UsageError if there is no such file, or no text in a folder.
    """
    check_encoding(encoding)
    if not paths:
        return _standard_library()
    files: dict[Path, Path] = {}
    skipped: Counter[str] = Counter()
    wanted = _is_wanted(encoding, text_column)
    for word in paths:
        for path in _expand(word, wanted, skipped):
            files.setdefault(path.resolve(), path)
    description = ", ".join(shown(path) for path in paths)
    return Source(description, tuple(files.values()), False, encoding, text_column, skipped)


def ending_of(name: str) -> str:
    """Return the ending that decides how a file is read: in lower case, and without .gz."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _standard_library() -> Source:
    folder = Path(sysconfig.get_path("stdlib"))
    is_python, found = (lambda path: path.suffix.lower() == ".py"), Counter()
    files = _walk(folder, is_python, SKIPPED_FOLDERS, found) if folder.is_dir() else []
    if not files:
        raise UsageError(
            f"{shown(folder)}: no standard library source here; pass {parameter('data')} PATH"
        )
    version = platform.python_version()
    return Source(f"the standard library of Python {version} ({folder})", tuple(files), True)


def _is_wanted(encoding: str, column: str) -> Callable[[Path], bool]:
    """Return a predicate for the files of a folder that are read."""

    def is_wanted(path: Path) -> bool:
        ending = ending_of(path.name)
        if path.name.lower().endswith(".gz") and ending not in PACKED:
            return False
        if ending == ".json":
            return path.is_file() and rows.is_table(path, column, encoding)
        if ending == ".pdf":
            return importlib.util.find_spec("pypdf") is not None
        return ending in (*TEXT_ENDINGS, *ROW_ENDINGS, *formats.READERS)

    return is_wanted


def _expand(word: str, wanted: Callable[[Path], bool], skipped: Counter[str]) -> list[Path]:
    if not word or "\0" in word:
        raise UsageError(f"{word!r} is not a path")
    if glob.has_magic(word) and not os.path.lexists(word):
        # Path.glob does not take absolute patterns.
        matches = [Path(match) for match in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
        files = [path for path in matches if path.is_file()]
        if glob.has_magic(Path(word).name):  # a plain file name is read wherever it is
            texts = [path for path in files if product_around(path) is None]
            skipped[OURS] += len({path.parent for path in files} - {path.parent for path in texts})
            files = texts
        if not files:
            raise UsageError(about_no_match(word, matches))
        skipped[FOLDER] += sum(path.is_dir() for path in matches) * ("**" not in word)
        return files
    path = Path(word)
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        if found := product(path):
            raise UsageError(
                f"{shown(path)}: a {found} of minillm, not text; name the files in it to read them"
            )
        here: Counter[str] = Counter()
        files = _walk(path, wanted, frozenset(), here)
        if not files:
            why = about_skipped(here).replace("text      skipped", "; it has")
            raise UsageError(
                f"{shown(path)}: no text in this folder, such as .txt, .md or .docx files{why}"
            )
        skipped.update(here)
        return files
    if not stat.S_ISREG(mode):
        raise UsageError(f"{shown(path)}: not a regular file; copy what it holds to a file first")
    if ending_of(path.name) not in formats.READERS:  # some of which are zip archives
        with naming(path):
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


def _walk(
    folder: Path,
    wanted: Callable[[Path], bool],
    without: frozenset[str],
    skipped: Counter[str],
) -> list[Path]:
    """Return the files below a folder that are read, in order, and count the others.

    folder: the folder
    wanted: predicate for the files that are read
    without: names of folders that are left out and not counted
    skipped: counter of the others
    """
    files = []
    for at, inner, names in os.walk(folder, onerror=_raise):
        skipped[HIDDEN] += sum(name.startswith(".") for name in inner)
        inner[:] = [name for name in inner if not name.startswith(".") and name not in without]
        skipped[LINK] += sum(Path(at, name).is_symlink() for name in inner)
        ours = [name for name in inner if product(Path(at, name))]
        skipped[OURS] += len(ours)
        inner[:] = [name for name in inner if name not in ours]
        for name in names:
            path = Path(at, name)
            if name.startswith((".", "~$")):  # Word makes ~$ files while it has one open
                skipped[HIDDEN] += 1
            elif wanted(path) and path.is_file():
                files.append(path)
            else:
                skipped[path.suffix.lower() or "without an ending"] += 1
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _raise(error: OSError) -> None:
    raise error
