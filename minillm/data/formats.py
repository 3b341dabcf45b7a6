"""Extract the text of documents that are not plain text: .docx, .epub, .html, .ipynb and .pdf.

All but .pdf are read with the standard library. A damaged file raises UsageError with its name. The
size that a file states is not trusted: at most LIMIT bytes are unpacked, and XML that declares
entities, which can expand without limit, is refused.
"""

import json
import logging
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from minillm.data.html_text import html_text
from minillm.data.plain_text import decode, refuse_others, shown, whole_characters
from minillm.data.rows import read_bytes
from minillm.errors import UnavailableError, UsageError

LIMIT = 256 << 20  # bytes unpacked from one file
ZIP = b"PK\x03\x04"  # first bytes of a zip archive
NO_PDF = 'reading .pdf needs pypdf: pip install "minillm[pdf]"'
# Deleted text, moved text at its old place, properties, and a second form of a text box.
NOT_WORDS = frozenset(("del", "moveFrom", "pPr", "rPr", "tblPr", "sectPr", "Fallback"))


def text_of(path: Path, ending: str, errors: str, encoding: str) -> str:
    """Return the text of a file.

    path: the file
    ending: its ending, one of READERS
    errors: "strict" or "replace", for bytes that are invalid in the encoding
    encoding: encoding of the text, if the file does not state its own
    """
    text = READERS[ending](path, errors, encoding).replace("\0", "")
    return whole_characters(text, shown(path), errors)


def _html(path: Path, errors: str, encoding: str) -> str:
    return html_text(read_bytes(path), shown(path), errors, encoding)


def _notebook(path: Path, errors: str, encoding: str) -> str:
    """Return the sources of a Jupyter notebook's markdown and code cells, without their outputs."""
    try:
        book = json.loads(decode(read_bytes(path), shown(path), errors))
        sheets = [book] if "cells" in book else book["worksheets"]  # format 3
        cells = [cell for sheet in sheets for cell in sheet["cells"]]
        kept = [cell for cell in cells if cell["cell_type"] in ("markdown", "code", "heading")]
        sources = [cell["source"] if "source" in cell else cell["input"] for cell in kept]
        return "\n\n".join("".join(source) for source in sources if source) + "\n"
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{shown(path)}: not a Jupyter notebook, or damaged") from None


def _docx(path: Path, errors: str, encoding: str) -> str:
    """Return the paragraphs and tables of a Word document, with all tracked changes accepted."""
    with _archive(path, "a Word document") as read:
        name = "word/document.xml"
        try:
            links = _xml(read("_rels/.rels"))
        except KeyError:
            links = Element("none")
        for link in links:
            if link.get("Type", "").endswith("/officeDocument"):
                name = link.get("Target", name).lstrip("/")
        return _word_text(_xml(read(name)))


def _word_text(node: Element) -> str:
    kind = _local(node)
    if kind in NOT_WORDS:
        return ""
    if kind == "t":
        return node.text or ""
    if kind in ("tab", "br", "cr", "noBreakHyphen"):
        return {"tab": "\t", "noBreakHyphen": "-"}.get(kind, "\n")
    if kind == "tr":
        cells = [_word_text(cell).strip("\n") for cell in node if _local(cell) == "tc"]
        return "\t".join(cell.replace("\n", " ") for cell in cells) + "\n"
    return "".join(map(_word_text, node)) + ("\n" if kind == "p" else "")


def _epub(path: Path, errors: str, encoding: str) -> str:
    """Return the chapters of an e-book in reading order, without its table of contents."""
    with _archive(path, "an e-book") as read:
        container = _xml(read("META-INF/container.xml"))
        package = next(n.get("full-path") for n in container.iter() if _local(n) == "rootfile")
        root = _xml(read(package))
        items = {n.get("id"): n for n in root.iter() if _local(n) == "item"}
        spine = [items[n.get("idref")] for n in root.iter() if _local(n) == "itemref"]
        chapters = [n.get("href") for n in spine if "nav" not in n.get("properties", "").split()]
        names = [posixpath.join(posixpath.dirname(package), unquote(href)) for href in chapters]
        names = [posixpath.normpath(name.partition("#")[0]) for name in names]
        try:
            locked = read("META-INF/encryption.xml").decode("utf-8", "replace")
        except KeyError:
            locked = ""
        if any(unquote(name) in unquote(locked) for name in names):
            raise UsageError(f"{shown(path)}: its text is encrypted (DRM); it cannot be read")
        where = f"{shown(path)}: "
        texts = [html_text(read(name), where + name, errors, "utf-8") for name in names]
        return "\n\n".join(text.strip("\n") for text in texts if text.strip()) + "\n"


def _pdf(path: Path, errors: str, encoding: str) -> str:
    """Return the text of a PDF's pages; raise UnavailableError if pypdf is missing."""
    try:
        from pypdf import PdfReader
    except ImportError:
        raise UnavailableError(f"{shown(path)}: {NO_PDF}") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it reports each malformed object
    data = path.read_bytes()
    try:
        pages = PdfReader(BytesIO(data)).pages
        text = "\n".join(page.extract_text() for page in pages) + "\n"
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise errors of all kinds
        raise UsageError(f"{shown(path)}: a damaged or locked PDF ({_why(error)})") from None
    return text.encode("utf-8", "replace").decode("utf-8")  # some fonts map to half characters


# Some are also read with .gz, see documents.PACKED.
READERS: dict[str, Callable[[Path, str, str], str]] = {
    ".docx": _docx,
    ".epub": _epub,
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".ipynb": _notebook,
    ".pdf": _pdf,
}


@contextmanager
def _archive(path: Path, what: str) -> Iterator[Callable[[str], bytes]]:
    """Open a zip archive, and yield a function from a member's name to its bytes.

    Raises UsageError, which names the file, if it or a member is damaged or too large. The function
    raises KeyError if there is no such member. Uncaught, that counts as damage too.
    """
    left, data = LIMIT, path.read_bytes()  # in memory, so that errors below are not of the disk
    refuse_others(data, shown(path), but=ZIP)
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:

            def read(name: str) -> bytes:
                nonlocal left
                with archive.open(name) as member:
                    content = member.read(left + 1)
                left -= len(content)
                if left < 0:
                    raise UsageError(
                        f"{shown(path)}: unpacks to more than {LIMIT >> 20} MiB; give its text"
                    )
                return content

            yield read
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # damaged archives and XML raise errors of all kinds
        raise UsageError(f"{shown(path)}: {what}, but damaged ({_why(error)})") from None


def _why(error: Exception) -> str:
    why = " ".join(str(error.args[0] if error.args else "").split()) or type(error).__name__
    return why if len(why) <= 100 else why[:97] + "..."


def _xml(data: bytes) -> Element:
    """Parse XML; raise ValueError if it declares entities."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = _refuse_entity
    parser.Parse(data, True)
    return builder.close()


def _refuse_entity(*declaration: object) -> None:
    raise ValueError("its XML declares entities")


def _local(node: Element) -> str:
    """Return an element's name without the prefix of its namespace."""
    return re.sub(r"^.*:", "", node.tag)
