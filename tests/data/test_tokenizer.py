"""tokenizer.py and bpe.py: lossless, the same line by line as whole, saved and loaded."""

import json
import pathlib
from io import BytesIO

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st

from minillm.data import bpe
from minillm.data.tokenizer import BpeTokenizer, load_tokenizer, train_tokenizer
from minillm.errors import CorruptError, UsageError

HARD = [
    "",
    "\n",
    "\n\n\n",
    "  two  spaces   three\t\ttabs\t \n",
    "\r\nwindows\r\nlines\r",
    "\U0001f642 emoji \U0001f469\u200d\U0001f4bb joined",
    "\ufb01 ligature, \u212b angstrom, \u1e9b\u0323 composed, e\u0301",
    "\x01\x02\x07\x0b\x0c\x1b\x7f\x85\u2028\u2029\u00a0",
    "\u2581 the mark \u2581\u2581 of spaces \u2581",
    "\ufeffbom \ufffd replacement",
    "<s></s><unk><0x41>",
    "x = 1234567890",
    "\u4e16\u754c \u0645\u0631\u062d\u0628\u0627",
]


@pytest.fixture(scope="module")
def code():
    folder = pathlib.Path(json.__file__).parent
    return [path.read_text("utf-8") for path in sorted(folder.glob("*.py"))]


@pytest.fixture(scope="module")
def tokenizers(code):
    return {
        "bpe": train_tokenizer("bpe", code, 600),
        "byte": train_tokenizer("byte", []),
        "char": train_tokenizer("char", [*code, *HARD]),
    }


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_hard_texts_come_back(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in HARD:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.bos_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_comes_back(tokenizers, text):
    for kind in ("bpe", "byte"):
        assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab \t\n\r_(=1\u00e9\u2028\x0b", max_size=300))
def test_line_by_line_ids_are_the_ids_of_the_whole(tokenizers, text):
    tokenizer = tokenizers["bpe"]
    assert tokenizer.by_lines
    assert tokenizer.encode(text) == tokenizer._pieces.encode(text)


def test_line_by_line_ids_are_the_ids_of_the_whole_on_code(tokenizers, code):
    tokenizer = tokenizers["bpe"]
    for text in code:
        assert tokenizer.encode(text) == tokenizer._pieces.encode(text)
        assert len(tokenizer.encode(text)) < len(text) / 1.5


def test_lines_keep_everything_and_cut_long_ones():
    for text in HARD:
        assert "".join(bpe.lines(text)) == text
    long = "x" * (2 * bpe.LINE_LIMIT + 5) + "\nshort\n"
    assert [len(part) for part in bpe.lines(long)] == [bpe.LINE_LIMIT, bpe.LINE_LIMIT, 6, 6]
    assert "".join(bpe.lines(long)) == long


def test_long_line_comes_back(tokenizers):
    text = "ab " * 20_000 + "\u2581" + "c" * 20_000
    assert tokenizers["bpe"].decode(tokenizers["bpe"].encode(text)) == text


def test_bytes_of_ids_are_the_bytes_of_the_text_in_order(tokenizers):
    text = "a\U0001f642b\u2581"
    for kind in ("bpe", "byte"):
        ids = tokenizers[kind].encode(text)
        assert b"".join(tokenizers[kind].decode_bytes([i]) for i in ids) == text.encode()
        assert tokenizers[kind].decode_bytes([tokenizers[kind].bos_id]) == b""
        assert tokenizers[kind].decode(ids[:2])[0] == "a"


def test_ids_out_of_range_are_refused(tokenizers):
    for tokenizer in tokenizers.values():
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(UsageError, match="token ids"):
                tokenizer.decode([wrong])


def test_special_ids(tokenizers):
    assert (tokenizers["bpe"].bos_id, tokenizers["byte"].bos_id) == (1, 256)
    assert tokenizers["char"].bos_id is None
    assert tokenizers["byte"].vocab_size == 257
    assert tokenizers["bpe"].vocab_size == 600


def test_char_is_the_texts_characters_by_code_point():
    tokenizer = train_tokenizer("char", ["hello", "\u00e9 z"])
    assert tokenizer.vocab_size == 7
    assert [tokenizer.decode([i]) for i in range(7)] == [" ", "e", "h", "l", "o", "z", "\u00e9"]
    with pytest.raises(UsageError, match="'Q' at position 2 "):
        tokenizer.encode("heQQ")


def test_half_characters_are_refused(tokenizers):
    for kind in ("bpe", "byte"):
        with pytest.raises(UsageError, match="position 1"):
            tokenizers[kind].encode("a\ud800")


def test_training_is_deterministic(code):
    assert train_tokenizer("bpe", code, 500).sha256 == train_tokenizer("bpe", code, 500).sha256


def test_vocabulary_shrinks_to_what_the_text_supports():
    tokenizer = train_tokenizer("bpe", ["hello hello"], 4000)
    assert 260 < tokenizer.vocab_size < 320
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


def test_text_without_a_space_gives_a_lossless_tokenizer():
    """The space must be known even where none was seen, or encoding drops it."""
    tokenizer = train_tokenizer("bpe", ["abc\ndef\n" * 200, "x=1\n" * 50], 330)
    assert tokenizer.note == "" and tokenizer.by_lines
    for text in (" ", "   ", "abc def", " abc\n  def ", "a \u2581 b", *HARD):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_thousands_of_characters_fit_a_small_vocabulary():
    text = "".join(map(chr, range(0x4E00, 0x5200))) + "\u4e00\u4e01" * 50
    tokenizer = train_tokenizer("bpe", [text], 400)
    assert tokenizer.vocab_size <= 400
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("size", [0, 1, 100, 319, 2_000_000])
def test_vocabulary_size_out_of_range(size):
    with pytest.raises(UsageError, match=f"vocab_size {size}"):
        train_tokenizer("bpe", ["text"], size)


def test_sample_is_bounded_and_in_order():
    lines = [f"{i:09d}" for i in range(5000)]
    sample = bpe._sample(["\n".join(lines)], limit=9000)
    assert 300 < len(sample) <= 1000
    assert sample == sorted(sample)
    assert set(sample) <= set(lines)
    assert min(sample) < "000000500" and max(sample) > "000004500"


def test_vocabulary_size_follows_the_corpus():
    sizes = [bpe.choose_vocab_size(n) for n in (1, 10**5, 11_065_582, 10**9, 10**12)]
    assert sizes == [512, 512, 4096, 32768, 32768]
    assert bpe.choose_vocab_size(10_500_000) == bpe.choose_vocab_size(12_000_000)


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_save_and_load(tokenizers, kind, tmp_path):
    path = tokenizers[kind].save(tmp_path)
    loaded = load_tokenizer(path)
    text = "x = [1]\n"
    assert path.name == ("tokenizer.model" if kind == "bpe" else "tokenizer.json")
    assert loaded.kind == kind
    assert loaded.sha256 == tokenizers[kind].sha256
    assert loaded.encode(text) == tokenizers[kind].encode(text)


def foreign(code, **options):
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(code), model_writer=model, minloglevel=2, **options
    )
    return BpeTokenizer(model.getvalue())


def test_foreign_model_with_a_dummy_prefix_gets_whole_texts(code):
    lines = [line for text in code for line in text.split("\n") if line]
    tokenizer = foreign(
        lines,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
    )
    assert not tokenizer.by_lines
    assert "not lossless" in tokenizer.note
    text = "def f():\n    return 1\n"
    assert tokenizer.encode(text) == tokenizer._pieces.encode(text)


def test_foreign_model_with_a_piece_across_lines_gets_whole_texts():
    tokenizer = foreign(
        ["a\nb " * 50, "c d e f"] * 20,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        split_by_unicode_script=False,
    )
    assert len(tokenizer.encode("a\nb")) == 1
    assert not tokenizer.by_lines


def test_foreign_model_without_bytes_or_start(code):
    lines = [line for text in code for line in text.split("\n") if line]
    tokenizer = foreign(lines, model_type="unigram", vocab_size=200, bos_id=-1)
    assert tokenizer.bos_id is None
    assert "not lossless" in tokenizer.note


def test_ours_have_no_note(tokenizers):
    assert [tokenizer.note for tokenizer in tokenizers.values()] == ["", "", ""]


@pytest.mark.parametrize(
    "name, content, kind, message",
    [
        ("a.model", b"", CorruptError, "not a SentencePiece model"),
        ("a.model", b"rubbish" * 50, CorruptError, "not a SentencePiece model"),
        ("a.model", b"\x80\x02}q\x00.", UsageError, "pickled files are never read"),
        ("a.json", b"{", CorruptError, "not valid JSON"),
        ("a.json", b"[" * 100_000, CorruptError, "not valid JSON"),
        ("a.json", b"[1]", UsageError, "not a tokenizer of minillm"),
        ("a.json", b'{"version": "1.0", "model": {}}', UsageError, "Hugging Face"),
        ("a.json", b'{"version": 2, "kind": "byte"}', UsageError, "version 1"),
        ("a.json", b'{"version": 1, "kind": "char", "characters": "ba"}', CorruptError, "sorted"),
        ("a.json", b'{"version": 1, "kind": "char", "characters": ""}', CorruptError, "sorted"),
    ],
)
def test_bad_files(tmp_path, name, content, kind, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        load_tokenizer(tmp_path / name)


def test_truncated_model_is_refused(tokenizers, tmp_path):
    data = tokenizers["bpe"].to_bytes()
    (tmp_path / "a.model").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptError, match="a.model"):
        load_tokenizer(tmp_path / "a.model")
    with pytest.raises(UsageError, match="no such file"):
        load_tokenizer(tmp_path / "b.model")


# SentencePiece keeps some of these for itself, or gives them a meaning of their own.
SPECIAL = [
    *("\u2585", "\u2581", "\u2584", "\0", "\t", "\r", "\x1b", "\x85", "\u2028", "\u2047"),
    *("\ufeff", "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ue000"),
    *("<unk>", "<s>", "</s>", "<0x41>", "   "),
]


@pytest.mark.parametrize("special", SPECIAL, ids=ascii)
def test_a_special_character_keeps_no_line_out_of_the_tokenizers_training(special):
    lines = [f"cpu {special} {i}% idle process waiting\n" for i in range(100)]
    plain = train_tokenizer("bpe", ["".join(lines).replace(special, "X")], 400)
    made = train_tokenizer("bpe", ["".join(lines)], 400)
    text = "".join(lines)
    assert made.decode(made.encode(text)) == text and made.note == "" and made.by_lines
    words = "idle process waiting\n"
    assert len(made.encode(words)) == len(plain.encode(words)) <= 5


def test_the_reserved_character_is_one_token_and_never_a_word_across():
    made = train_tokenizer("bpe", ["load \u2585\u2585 high\n" * 50 + "\u2585\n"], 400)
    assert len(made.encode("\u2585\u2585\u2585")) == 3
    for text in ("\u2585", "\u2585\n\n\u2585"):
        alone = train_tokenizer("bpe", [text], 320)
        assert alone.decode(alone.encode(text + "other words")) == text + "other words"


def test_text_that_sentencepiece_cannot_learn_from_is_refused_in_plain_words():
    with pytest.raises(UsageError, match="^no bpe tokenizer .* this text; use tokenizer byte$"):
        train_tokenizer("bpe", ["\0\0"], 400)


FOREIGN = {
    "default": {},
    "bpe": {"model_type": "bpe"},
    "identity": {
        "model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True,
        "remove_extra_whitespaces": False,
    },
    "no prefix": {"model_type": "bpe", "add_dummy_prefix": False},
    "surface": {"unk_surface": "??"},
    "suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True},
}  # fmt: skip
SENTENCES = ["the cat sat on the mat", "and the dog ran far", "hello again and again"] * 20
PLAIN = ["", "the cat", "the cat sat", " the  cat ", "a", "the \u00e9 cat", "\u00e9 the", "a\nb"]


@pytest.mark.parametrize("options", FOREIGN.values(), ids=FOREIGN)
def test_foreign_models_decode_as_sentencepiece_does(options):
    tokenizer = foreign(SENTENCES, vocab_size=300, hard_vocab_limit=False, **options)
    theirs = tokenizer._pieces
    for text in PLAIN:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == theirs.decode(ids)
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == theirs.decode(ids)
    space, word = theirs.piece_to_id("\u2581"), theirs.encode("the")
    for ids in ([space, space, *word], [space], [1, space, space, *word], [*word, 1, *word]):
        assert tokenizer.decode(ids) == theirs.decode(ids)


def test_foreign_models_give_text_back_where_their_normaliser_allows_it():
    tokenizer = foreign(SENTENCES, vocab_size=300, hard_vocab_limit=False, **FOREIGN["identity"])
    assert "not lossless" in tokenizer.note
    for text in (*PLAIN, "  two  spaces  ", "\n", "x\u0301\t", "\U0001f642"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    unknown = foreign(SENTENCES, vocab_size=300, hard_vocab_limit=False)
    assert unknown.decode(unknown.encode("the \u00e9")) == "the  \u2047 "


def test_an_empty_prompt_is_the_end_of_a_line_and_the_mark_of_a_document():
    """As in training, where the mark follows the end of another document."""
    assert train_tokenizer("byte", []).prompt_ids("") == [10, 256]
    assert train_tokenizer("byte", []).prompt_ids("", one_document=True) == [256]
    bpe = train_tokenizer("bpe", ["a line\n" * 200 + "another line of text\n" * 200], 320)
    first, last = bpe.prompt_ids("")
    assert bpe.decode([first]) == "\n" and last == bpe.bos_id
    assert bpe.prompt_ids("a")[0] == bpe.bos_id
