"""A terminal for tests: a pseudo-terminal of a given width, and what a user would see on it."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Screen:
    """The lines that a terminal shows, with all that has scrolled away.

    columns: a longer line is wrapped, as a terminal does.
    raw: everything that was written.
    """

    def __init__(self, columns: int) -> None:
        self.columns, self.raw = columns, ""
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0
        self.wrapped = 0

    def feed(self, text: str) -> None:
        """Show `text`, which may hold \\r, \\n, ESC [ K and ESC [ J."""
        self.raw += text
        for part in re.findall(r"\x1b\[[JK]|[^\x1b]|\x1b", text):
            if part in ("\x1b[K", "\x1b[J"):
                del self.lines[self.row][self.column :]
                if part == "\x1b[J":
                    del self.lines[self.row + 1 :]
            elif part == "\r":
                self.column = 0
            elif part == "\n":
                self._down()
            else:
                self._put(part)

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append([])

    def _put(self, character: str) -> None:
        assert character.isprintable(), f"{character!r} reached the terminal"
        if self.column == self.columns:
            self.wrapped += 1
            self._down()
        line = self.lines[self.row]
        line.extend(" " * (self.column + 1 - len(line)))
        line[self.column] = character
        self.column += 1

    @property
    def shown(self) -> list[str]:
        """The lines without spaces at their ends, and without empty lines at the end."""
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip().split("\n")


@contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, Screen]]:
    """A stream that is a terminal of this width; its screen is complete after the `with` block."""
    screen = Screen(columns)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    chunks: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            chunks.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    stream = os.fdopen(theirs, "w", encoding="utf-8")
    try:
        yield stream, screen
    finally:
        stream.close()
        reader.join()
        os.close(ours)
        screen.feed(b"".join(chunks).decode().replace("\r\n", "\n"))
