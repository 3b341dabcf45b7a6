"""What is held out: how much, of what, and what is said of it."""

import json
import random
import shutil
from pathlib import Path

import pytest

from minillm.data import documents, encode, prepare as corpus_module
from minillm.data.prepare import Preparation, prepare
from minillm.data.split import split
from minillm.data.survey import survey
from minillm.data.tokenizer import CharTokenizer
from minillm.errors import UsageError
from tests.data.test_prepare import make, texts

WORDS = "the cat sat on a mat and dogs ran far over hills".split()


def novel(seed: int, size: int) -> str:
    """About `size` bytes of sentences, lines and paragraphs."""
    draw, lines = random.Random(seed), []
    while sum(map(len, lines)) < size:
        lines.append(" ".join(draw.choices(WORDS, k=12)) + ".\n" + "\n" * (draw.random() < 0.2))
    return "".join(lines)


def write(folder: Path, sizes: list[int]) -> Path:
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"{number:02d}.txt").write_text(novel(number, size))
    return folder


UNEQUAL = {
    "a novel and a note": [50_000, 3],
    "two books": [30_000, 30_000],
    "three novels": [30_000, 40_000, 20_000],
    "one of ten has nearly all": [*[100] * 9, 40_000],
    "four, of two sizes": [1000, 1000, 30_000, 30_000],
    "ten equal ones": [5000] * 10,
    "three short ones": [70, 70, 70],
}


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("sizes", UNEQUAL.values(), ids=UNEQUAL)
def test_the_held_out_share_is_near_the_wish_with_few_or_unequal_documents(
    tmp_path, sizes, fraction
):
    folder = write(tmp_path / "s", sizes)
    said = []
    corpus = make(folder, tmp_path / "c", val_fraction=fraction, say=said.append)
    whole = [path.read_text() for path in sorted(folder.iterdir())]
    heads, tails = texts(corpus, "train"), texts(corpus, "val")
    n_bytes = sum(map(len, whole))
    assert sum(map(len, tails)) == corpus.bytes["val"] and sum(map(len, heads)) + sum(
        map(len, tails)
    ) == n_bytes == sum(corpus.bytes.values())
    assert fraction / 3 <= corpus.bytes["val"] / n_bytes <= 3 * fraction
    assert not any("was asked for" in line for line in said)
    for text in whole:  # each is on one side or, cut once, on both
        assert (
            text in heads
            or text in tails
            or any(text == head + tail for head in heads for tail in tails)
        )


def test_a_tail_begins_behind_a_paragraph_or_a_line(tmp_path):
    corpus = make(write(tmp_path / "s", [30_000, 40_000]), tmp_path / "c")
    assert all(head.endswith(".\n\n") for head in texts(corpus, "train"))


def test_the_split_depends_on_text_and_settings_alone(tmp_path):
    write(tmp_path / "s", [3000, 4000, 10])
    (tmp_path / "t").mkdir()
    for name, other in (("00", "z"), ("01", "y"), ("02", "x")):
        text = (tmp_path / "s" / f"{name}.txt").read_text()
        (tmp_path / "t" / f"{other}.txt").write_text(text)
    made = [make(tmp_path / name, tmp_path / f"c{name}") for name in ("s", "t")]
    for side in ("train", "val"):
        assert set(texts(made[0], side)) == set(texts(made[1], side))


def test_many_small_documents_are_split_as_ever(tmp_path):
    """The old rule, written out: whole documents, by the hash of their text."""
    import hashlib

    folder = write(tmp_path / "s", [200] * 60)
    whole = [path.read_text() for path in folder.iterdir()]
    order = sorted(whole, key=lambda text: hashlib.sha256(text.encode()).digest()[:16])
    held, wanted = [], 0.05 * sum(map(len, whole))
    while sum(map(len, held)) < wanted:
        held.append(order.pop(0))
    corpus = make(folder, tmp_path / "c")
    assert set(texts(corpus, "val")) == set(held)
    assert "split" not in corpus.settings


def test_what_is_held_out_is_said_by_name_up_to_three(tmp_path):
    said = []
    settings = {"say": said.append, "cache_dir": tmp_path / "cache"}
    for _ in range(2):  # prepared, and found prepared
        corpus = make(write(tmp_path / f"s{len(said)}", [8000] * 2), None, **settings)
        held, total = corpus.bytes["val"], sum(corpus.bytes.values())
        assert said[-1].splitlines()[1] == (
            f"text      held out {held:,} of {total:,} bytes ({held / total:.1%}): "
            "the end of 00.txt and the end of 01.txt"
        )
    make(write(tmp_path / "many", [300] * 90), None, **settings)
    line = said[-1].splitlines()[1]
    assert line.count(".txt") == 3 and line.endswith("more") and " and " in line


@pytest.mark.parametrize("given", [False, True], ids=["share", "named"])
def test_what_is_held_out_has_its_present_name_where_the_text_was_prepared_before(tmp_path, given):
    """The cache goes by the content of the text alone, so that its files may have been renamed."""
    text, other = tmp_path / "old.txt", tmp_path / "other.txt"
    other.write_text(novel(1, 3000))
    said = []
    for name in ("old.txt", "new.txt"):
        text = text.rename(tmp_path / name) if text.exists() else text
        text.write_text(novel(0, 3000))
        settings = {"val": [str(text)]} if given else {}
        make(other if given else text, None, cache_dir=tmp_path / "c", say=said.append, **settings)
        assert said[-1].splitlines()[1].endswith(f": {'' if given else 'the end of '}{name}")
    assert "found prepared" in said[-1]


def test_little_held_out_text_is_warned_of(tmp_path):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cd", "ef"))
    (tmp_path / "rows.jsonl").write_text(rows)
    said = []
    make(tmp_path / "rows.jsonl", tmp_path / "c", say=said.append)
    assert "50.0% of the text is held out, 5.0% was asked for" in said[-1]
    assert "warning   only 6 tokens are held out" in said[-1]
    said.clear()
    make(tmp_path / "rows.jsonl", tmp_path / "d", say=said.append, val_fraction=0)
    assert "warning" not in said[-1]


def test_validation_text_can_be_named(tmp_path):
    folder = write(tmp_path / "s", [400] * 5)
    (tmp_path / "v.txt").write_text("validation text\n" * 40)
    inside = folder / "03.txt"
    val = [str(tmp_path / "v.txt"), str(inside)]
    corpus = make(folder, tmp_path / "c", val=val)
    assert texts(corpus, "val") == [(tmp_path / "v.txt").read_text(), inside.read_text()]
    others = [path.read_text() for path in sorted(folder.iterdir()) if path != inside]
    assert texts(corpus, "train") == others
    assert corpus.bytes["val"] == sum(map(len, texts(corpus, "val")))
    # Another text is another corpus, and no part of the text is held out besides.
    assert make(folder, None, cache_dir=tmp_path / "x", val=val[:1]).key != corpus.key
    with pytest.raises(UsageError, match="nothing is left to train on"):
        make(inside, tmp_path / "d", val=[str(folder)])
    with pytest.raises(UsageError, match="no text; its files are empty"):
        (tmp_path / "blank.txt").write_text(" ")
        make(folder, tmp_path / "d", val=[str(tmp_path / "blank.txt")])


def test_a_prepared_folder_stands_alone(tmp_path):
    folder = write(tmp_path / "s", [400] * 5)
    corpus = make(folder, tmp_path / "c")
    for paths, val, message in (
        ([corpus.folder, folder], None, "is prepared already and cannot be joined"),
        ([folder, corpus.folder], None, "is prepared already and cannot be joined"),
        ([corpus.folder], [folder], "has its own validation text; leave val out"),
        ([folder], [corpus.folder], "val .* is prepared already"),
    ):
        with pytest.raises(UsageError, match=message):
            how = Preparation(val_fraction=0.1, val=[str(p) for p in val or []] or None)
            prepare([str(p) for p in paths], how)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_character_that_the_tokenizer_lacks_is_named_with_its_place(
    tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(encode, "PIECE", 100)  # so that documents are cut
    CharTokenizer("abc \n").save(tmp_path)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.txt").write_text("abc\n" * 100)
    before = "abc\n" * 70 + "a b"
    (tmp_path / "s" / "b.txt").write_text("\ufeff" + before + "\u00e9\n" * 90, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        make(tmp_path / "s", tmp_path / "c", tokenizer=str(tmp_path / "tokenizer.json"),
             workers=workers)  # fmt: skip
    assert "b.txt: line 71, column 4, offset 286: character '\\xe9' (U+00E9) is not among" in str(
        caught.value
    )


def test_the_split_of_a_changed_rule_has_another_key(tmp_path):
    """A folder that was prepared by the old rule must not be found for the new one."""
    folder = write(tmp_path / "s", [400, 500])
    corpus = make(folder, tmp_path / "c")
    assert corpus.settings["split"] == "tails"
    text = survey(documents.find([str(folder)]), "strict", False)
    assert split(text, 0.05).rule == "tails" and split(text, 0).rule == "documents"


def test_a_run_of_whole_documents_keeps_them_when_its_text_is_prepared_again(
    train, tmp_path, monkeypatch, capfd
):
    """Earlier releases held out whole documents only; their runs state no rule."""
    folder, cache = write(tmp_path / "texts", [3000, 2900, 3]), tmp_path / "cache"
    with monkeypatch.context() as earlier:
        earlier.setattr(corpus_module, "split", lambda text, x, whole: split(text, x, True))
        assert train("--data", folder, "--cache-dir", cache, "--out", tmp_path / "run") == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["corpus_settings"]
    assert "split" not in settings
    shutil.rmtree(cache)
    assert train("--resume", tmp_path / "run", "--steps", "9") == 0, capfd.readouterr().err
    # A new run of the same text takes the ends of the long ones.
    assert train("--data", folder, "--cache-dir", cache, "--out", tmp_path / "new") == 0
    settings = json.loads((tmp_path / "new" / "config.json").read_text())["corpus_settings"]
    assert settings["split"] == "tails"
