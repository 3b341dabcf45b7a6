"""Which text is where: files, folders, patterns or the standard library, as a stream of documents.

A document is one file, or one row of a .jsonl, .json or .parquet file. Only one of them is in
memory at a time, but all rows of a .json file. This module does not split, tokenize or write.

Text is UTF-8 or in the encoding that was named. A byte order mark at its start is stripped, line
ends stay as they are, and documents of nothing but white space are left out. Folders are read
recursively, without hidden names, without following links to folders, and in the order of their
POSIX paths, the same on every machine. What minillm made itself, runs, prepared corpora and
profiles, is not read as part of a folder, nor by a pattern, unless the pattern ends in the name of
a file. What is passed over is counted.
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
from minillm.errors import UsageError
from minillm.runtime.encodings import check_encoding, is_utf8
from minillm.runtime.files import naming
from minillm.runtime.ownership import product, product_around
from minillm.runtime.pickles import refuse_pickle

# What counts as text in a folder; a file named one by one may have any ending.
TEXT_ENDINGS = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".css"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".js", ".ts", ".java", ".go"),
    *(".rs", ".rb", ".php", ".sh", ".sql", ".lua", ".swift", ".kt", ".scala", ".hs", ".r", ".jl"),
)
ROW_ENDINGS = (".jsonl", ".parquet")
# Packed files are read too, but for those that are packed in themselves.
PACKED = (*TEXT_ENDINGS, ".jsonl", ".json", ".html", ".htm", ".xhtml", ".ipynb")
# Parts of the standard library that distributions strip, or that hold other people's packages.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")
)
# What `skipped` counts besides files by their ending.
HIDDEN, LINK, FOLDER, OURS, BLANK, NOT_UTF8 = (
    "hidden",
    "links to folders",
    "folders",
    "folders that minillm made (runs, prepared corpora)",
    "blank",
    "not UTF-8",
)
SHOWN_KINDS = 6


@dataclass(frozen=True)
class Document:
    """One text.

    name: the file, or file:row, to use when something is wrong with the text.
    start: bytes of the file before the text; None where the text is not the file's own bytes.
    """

    name: str
    text: str
    start: int | None = None


@dataclass(frozen=True)
class Source:
    """The files of a corpus in reading order.

    lenient: pass over files that are not UTF-8.
    encoding: of the text.
    column: where the rows of .jsonl, .json and .parquet files have their text.
    skipped: what was found and is not read, counted by its ending or as HIDDEN, LINK, FOLDER, OURS.
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

        errors: what to do with bytes that are not of the encoding. "strict" refuses, naming file
        and byte offset; "replace" puts U+FFFD in their place.
        skipped: counts what turns out to be BLANK or NOT_UTF8.
        """
        if errors not in ERRORS:
            raise UsageError(f"--errors {errors}: expected strict or replace")
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
    """Find the files that `paths` (files, folders, glob patterns) stand for.

    None is the default corpus: the .py files of the running Python's standard library, without
    SKIPPED_FOLDERS. A file that is named twice is read once, at its first place.
    encoding, text_column: as Source has them.
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
    """Return the ending that says how a file is read: lower case, and without .gz."""
    return Path(name.lower().removesuffix(".gz")).suffix


def about_skipped(skipped: Counter[str]) -> str:
    """Return a line on what was found and is not read, by its kind; "" if that is nothing."""
    others = (HIDDEN, LINK, FOLDER, OURS, BLANK, NOT_UTF8)
    kinds = [(n, kind) for kind, n in skipped.items() if kind not in others and n]
    kinds.sort(key=lambda kind: (-kind[0], kind[1]))
    said = [f"{n} {kind}" for n, kind in kinds[:SHOWN_KINDS]]
    if rest := sum(n for n, _ in kinds[SHOWN_KINDS:]):
        said.append(f"{rest} of other kinds")
    files = sum(n for n, _ in kinds)
    line = f"{files} file{'s' * (files != 1)} ({', '.join(said)})" if files else ""
    counted = (HIDDEN, LINK, FOLDER, OURS, NOT_UTF8)
    more = [f"{skipped[kind]} {kind}" for kind in counted if skipped[kind]]
    if skipped[BLANK]:
        more.append(f"{skipped[BLANK]} blank document{'s' * (skipped[BLANK] != 1)}")
    line = "; ".join([line, *more] if line else more)
    if skipped[".pdf"]:
        line += f"; {formats.NO_PDF}"
    return f"text      skipped {line}" if line else ""


def _standard_library() -> Source:
    folder = Path(sysconfig.get_path("stdlib"))
    is_python, found = (lambda path: path.suffix.lower() == ".py"), Counter()
    files = _walk(folder, is_python, SKIPPED_FOLDERS, found) if folder.is_dir() else []
    if not files:
        raise UsageError(f"{shown(folder)}: no standard library source here; pass --data PATH")
    version = platform.python_version()
    return Source(f"the standard library of Python {version} ({folder})", tuple(files), True)


def _is_wanted(encoding: str, column: str) -> Callable[[Path], bool]:
    """Return what tells whether a file in a folder is read."""

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
        # Path.glob takes no absolute patterns.
        matches = [Path(match) for match in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
        files = [path for path in matches if path.is_file()]
        if glob.has_magic(Path(word).name):  # a name without * is asked for, wherever it is
            texts = [path for path in files if product_around(path) is None]
            skipped[OURS] += len({path.parent for path in files} - {path.parent for path in texts})
            files = texts
        if not files:
            raise UsageError(f"{shown(word)}: no file matches this pattern")
        skipped[FOLDER] += sum(path.is_dir() for path in matches) * ("**" not in word)
        return files
    path = Path(word)
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        if found := product(path):
            raise UsageError(
                f"{shown(path)}: a {found} of minillm, not text; name the files in it to be read"
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
    """Return the files below `folder` that are `wanted`, in order; count the others in `skipped`.

    without: names of folders that are left out and not counted.
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
