"""Turn tokens into text as they come, without half characters and beginnings of stop texts."""

import codecs
from collections.abc import Sequence

from minillm.data.tokenizer import Tokenizer


class TextStream:
    """The text of one row: `feed` takes a token and returns the text that is certain.

    tokenizer: the tokenizer of the model
    stops: texts that end the row; neither they nor the text after them is returned. BOS, which
        begins another document, ends the row too.
    skip: bytes of the first token that the prompt already has, see Tokenizer.heal
    starts: whether the tokens start a text; they do not if they continue a prompt

    finish: why the row has ended, "stop" or "document"; None if it has not
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        skip: int = 0,
        starts: bool = True,
    ) -> None:
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        # Bytes that are not UTF-8 become U+FFFD; a model can write any bytes.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.skip = skip
        self.starts = starts and not skip
        self.ids: list[int] = []
        self.text = ""
        self.held = ""
        self.finish: str | None = None

    def feed(self, token: int) -> str:
        """Take one token and return the text that is now certain."""
        if token == self.tokenizer.bos_id:
            self.finish = "document"
            return self.flush()
        self.ids.append(token)
        if self.starts:
            data, self.starts = self.tokenizer.at_start(token)
        else:
            data, self.skip = self.tokenizer.decode_bytes([token])[self.skip :], 0
        self.held += self.decoder.decode(data)
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.finish = "stop"
            self.held, sure = "", self.held[: min(found)]
            self.decoder.reset()
            return self._give(sure)
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        sure = self.held[: len(self.held) - keep]
        self.held = self.held[len(sure) :]
        return self._give(sure)

    def flush(self) -> str:
        """Return the text that was held back; no token follows."""
        rest, self.held = self.held + self.decoder.decode(b"", final=True), ""
        return self._give(rest)

    def _give(self, text: str) -> str:
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
