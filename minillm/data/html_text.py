"""Extract the visible text of HTML: no scripts, styles or tags, and one line for each block."""

import re
from html.parser import HTMLParser

from minillm.data.plain_text import decode

UNSEEN = frozenset(("script", "style", "title", "template"))
# Elements that begin and end lines; those of APART have an empty line around them too.
LINES = frozenset(
    "address article aside dd details dialog div dl dt fieldset figcaption figure footer form"
    " header hgroup li main nav section summary option body tr caption br"
    " p h1 h2 h3 h4 h5 h6 blockquote pre ul ol table hr".split()
)
APART = frozenset("p h1 h2 h3 h4 h5 h6 blockquote pre ul ol table hr".split())
SPACES = re.compile(r"[ \t\n\r\f]+")  # not the non-breaking space
CHARSET = re.compile(
    rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w.:-]+)|<\?xml[^>]+encoding\s*=\s*["']([\w.:-]+)""",
    re.IGNORECASE,
)
# Pages that state these encodings have the quotes and dashes of Windows; browsers know that.
WINDOWS = frozenset(("iso-8859-1", "iso8859-1", "latin1", "latin-1", "ascii", "us-ascii"))


def html_text(data: bytes, where: str, errors: str, encoding: str) -> str:
    """Return the text of a page.

    data: the page
    where: its name for messages
    errors: "strict" or "replace", for bytes that are invalid in the encoding
    encoding: encoding of the page. If it is UTF-8, the encoding that the page states is preferred.
    """
    page = _Page()
    page.feed(decode(data, where, errors, _encoding(data, encoding)))
    page.close()
    return page.text()


def _encoding(data: bytes, given: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    found = CHARSET.search(data[:4096])
    if data.startswith(b"\xef\xbb\xbf") or given.lower() not in ("utf-8", "utf8") or not found:
        return given
    name = (found[1] or found[2]).decode("ascii", "replace").lower()
    if name in WINDOWS:
        return "cp1252"
    try:
        return name if b"<".decode(name) == "<" else given
    except (LookupError, ValueError):
        return given


class _Page(HTMLParser):
    """Parser that collects the text of a page, with the line ends and spaces of a browser."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._breaks = 0  # line ends to write before the next word
        self._space = False  # whether to write a space before it
        self._unseen = ""  # the open element whose content is not text
        self._kept = 0  # number of open <pre> elements
        self._fresh = False  # directly after <pre>, where a line end is dropped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a line if the element is a block."""
        if self._unseen and tag not in ("body", "p", "div"):  # which end an unclosed one
            return
        self._unseen = tag if tag in UNSEEN else ""
        if tag in ("td", "th") and self._parts and not self._breaks:
            self._breaks, self._space = 0, False
            self._parts.append("\t")
        self._end_line(tag)
        if tag == "pre":
            self._kept, self._fresh = self._kept + 1, True

    def handle_endtag(self, tag: str) -> None:
        """End the line if the element is a block."""
        if tag == self._unseen:
            self._unseen = ""
        if tag == "pre":
            self._kept = max(0, self._kept - 1)
            self._parts[-1:] = [part.removesuffix("\n") for part in self._parts[-1:]]
        if tag != "br":
            self._end_line(tag)

    def handle_data(self, data: str) -> None:
        """Add text; runs of white space become one space unless the text is preformatted."""
        if self._unseen:
            return
        if self._kept:
            data = data.replace("\r\n", "\n").replace("\r", "\n")
            self._add(data.removeprefix("\n") if self._fresh else data)
            self._fresh = False
            return
        words = SPACES.sub(" ", data)
        if words.startswith(" "):
            self._space = True
        if words := words.strip(" "):
            self._add(words)
            self._space = data.endswith((" ", "\t", "\n", "\r", "\f"))

    def text(self) -> str:
        """Return the collected text with a line end after it."""
        return "".join(self._parts).rstrip("\n") + "\n"

    def _end_line(self, tag: str) -> None:
        if tag == "br":
            self._breaks += 1
        elif tag in LINES:
            self._breaks = max(self._breaks, 2 if tag in APART else 1)

    def _add(self, words: str) -> None:
        if not words:
            return
        if self._breaks and self._parts:
            self._parts.append("\n" * self._breaks)
        elif self._space and self._parts and self._parts[-1] != "\t":
            self._parts.append(" ")
        self._parts.append(words)
        self._breaks, self._space = 0, False
