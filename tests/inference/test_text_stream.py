"""Text as it comes: never half a character, nothing of a stop text, and in sum the whole."""

from io import BytesIO

import pytest
import sentencepiece
from hypothesis import example, given, strategies as st

from minillm.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, train_tokenizer
from minillm.inference.text_stream import TextStream

BYTE = ByteTokenizer()
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u05e9\u05dc\u05d5\u05dd \u00e9"


def texts():
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def stream(text: str | bytes, stops=(), tokenizer=BYTE, skip=0) -> tuple[list[str], TextStream]:
    """What comes back for each token of `text`, and the stream, as sample.py uses it."""
    ids = list(text) if isinstance(text, bytes) else tokenizer.encode(text)
    s = TextStream(tokenizer, stops, skip)
    given_out = []
    for token in ids:
        given_out.append(s.feed(token))
        if s.finish:
            break
    given_out.append(s.flush())
    return given_out, s


@given(texts())
@example(FAMILY)
def test_the_pieces_are_the_text(text):
    pieces, s = stream(text)
    assert "".join(pieces) == text == s.text
    assert s.finish is None and s.ids == list(text.encode())


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_decode_as_a_whole_does(data):
    pieces, _ = stream(data)
    assert "".join(pieces) == data.decode("utf-8", "replace")


def test_no_half_character_is_given_out():
    pieces, _ = stream(FAMILY)
    assert "\ufffd" not in "".join(pieces)
    # The bytes of a character are silent but for its last one.
    assert [p for p in pieces if p] == list(FAMILY)
    assert pieces[:4] == ["", "", "", FAMILY[0]]


def test_half_a_character_at_the_end_is_shown_as_such():
    pieces, _ = stream("a\u20ac".encode()[:-1])
    assert pieces == ["a", "", "", "\ufffd"]


# Few letters, so that stops and their beginnings are met often.
LETTERS = st.text("ab\u00e9", max_size=25)


@given(LETTERS, st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
@example("aab", ["ab"])
@example("aaab", ["aab"])
@example("abab\u00e9", ["aba\u00e9", "bab"])
def test_nothing_of_a_stop_text_or_after_it(text, stops):
    pieces, s = stream(text, stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert "".join(pieces) == text and s.finish is None
        return
    # The stop that is complete first ends the text, before the earliest that is complete there.
    read = text[: min(ends)]
    assert "".join(pieces) == read[: min(read.find(stop) for stop in stops if stop in read)]
    assert s.finish == "stop" and s.text == "".join(pieces)


def test_the_beginning_of_a_stop_is_held_back_until_it_is_none():
    pieces, s = stream("one\nUs: Use", ["\nUser:"])
    assert pieces == ["o", "n", "e", "", "", "", "\nUs:", " ", "U", "s", "e", ""]
    pieces, s = stream("one\nUs", ["\nUser:"])
    assert pieces[-1] == "\nUs" and s.finish is None


def test_an_empty_stop_text_stops_nothing():
    assert "".join(stream("ab", [""])[0]) == "ab"


def test_bos_ends_the_document():
    s = TextStream(BYTE, ["bc"])
    assert s.feed(ord("a")) == "a" and s.feed(ord("b")) == ""
    assert s.feed(256) == "b" and s.finish == "document"
    assert s.flush() == "" and s.text == "ab" and s.ids == list(b"ab")


class Pieces(Tokenizer):
    """Tokens of several bytes, which may end within a character."""

    vocab_size = 3
    _bytes_of = [b"x", b"yz\xe2\x82", b"\xac"]


def test_bytes_after_a_stop_in_the_same_token_are_dropped():
    s = TextStream(Pieces(), ["y"])
    assert [s.feed(0), s.feed(1), s.flush()] == ["x", "", ""]
    assert s.finish == "stop" and s.text == "x"
    s = TextStream(Pieces(), ["q"])
    assert [s.feed(1), s.feed(2), s.flush()] == ["yz", "\u20ac", ""]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    words = ["def f(x):\n    return x + 1\n", "class A:\n    pass\n\u00e9\u20ac\U0001f642\n"]
    return train_tokenizer("bpe", words * 20, 330)


@given(texts())
def test_pieces_of_several_characters(bpe, text):
    assert "".join(stream(text, tokenizer=bpe)[0]) == text


@given(st.text("def x:\n", min_size=1, max_size=12))
def test_a_healed_prompt_is_not_shown_twice(bpe, prompt):
    """The prompt and what is streamed after it are the text of the tokens."""
    full = bpe.prompt_ids(prompt + "def f(x):\n")
    ids, allowed, shown = bpe.heal(bpe.prompt_ids(prompt))
    rest = full[len(ids) :]
    if full[: len(ids)] != ids or (allowed and rest[0] not in allowed):
        return  # another path of tokens; the model could not have taken it
    s = TextStream(bpe, skip=shown)
    assert prompt + "".join(s.feed(t) for t in rest) + s.flush() == prompt + "def f(x):\n"


@pytest.fixture(scope="module")
def foreign() -> Tokenizer:
    """A SentencePiece model with its default options: a space is put before the first word."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "and the dog ran far"] * 20),
        model_writer=model, vocab_size=100, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return BpeTokenizer(model.getvalue())


@pytest.mark.parametrize("text", ["the cat", "a \u00e9 cat", "\u00e9", "the cat sat on the mat"])
def test_a_foreign_models_text_streams_as_it_decodes(foreign, text):
    ids = foreign.encode(text)
    pieces, s = stream(text, tokenizer=foreign)
    assert "".join(pieces) == s.text == foreign.decode(ids)
    for n in range(1, len(ids)):  # behind a prompt of the first n
        s = TextStream(foreign, starts=False)
        shown = foreign.decode(ids[:n]) + "".join(map(s.feed, ids[n:])) + s.flush()
        assert shown == foreign.decode(ids)
