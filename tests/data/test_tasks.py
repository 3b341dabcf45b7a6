"""data/tasks.py: answers by slow rules, splits apart, and corpora that train.py trains on."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from minillm.data.batches import IGNORED, Batches, evaluation_windows
from minillm.data.labelled import write_sequences
from minillm.data.shards import open_corpus
from minillm.errors import CorruptError, UsageError
from minillm.runtime import program

FILE = Path(__file__).resolve().parents[2] / "data" / "tasks.py"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="the source tree is not here")


@pytest.fixture(scope="module")
def tasks():
    spec = importlib.util.spec_from_file_location("tasks", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(tasks, name, part="train", count=50, **sizes):
    return tasks.sequences(tasks.TASKS[name](**sizes), part, count)


def test_register(tasks):
    tables = tasks.permutations(4, 6)
    for tokens, answers, hops in zip(*drawn(tasks, "register"), strict=True):
        value = age = None
        for token, answer, hop in zip(tokens, answers, hops, strict=True):
            value, age = (token, 0) if token < 4 else (tables[token - 4][value], age + 1)
            assert (answer, hop) == (value, age)
    _, _, hops = drawn(tasks, "register", chain=True)
    assert (hops == np.arange(32)).all()


def test_registers(tasks):
    """Depth is not distance: a value may come from long ago in one step."""
    tables = tasks.permutations(4, 3)
    all_tokens, all_answers, all_hops = drawn(tasks, "registers", count=200)
    for tokens, answers, hops in zip(all_tokens, all_answers, all_hops, strict=True):
        held: dict[int, tuple[int, int]] = {}
        for token, answer, hop in zip(tokens, answers, hops, strict=True):
            if token < 12:
                held[token // 4] = token % 4, 0
                i = token // 4
            else:
                ig, j = divmod(token - 12, 3)
                i, g = divmod(ig, 3)
                if j in held:
                    held[i] = tables[g][held[j][0]], held[j][1] + 1
                else:
                    held.pop(i, None)
            assert (answer, hop) == held.get(i, (IGNORED, -1))
    assert all_hops.max() > 8


def test_hop(tasks):
    tokens, answers, hops = drawn(tasks, "hop", count=300, length=20, hops=3)
    assert (answers[:, :-1] == IGNORED).all() and set(hops[:, -1]) == {1, 2, 3}
    for x, answer in zip(tokens, answers[:, -1], strict=True):
        at = len(x) - 1
        for _ in range(x[0] + 1):
            earlier = [k for k in range(1, at) if x[k] == x[at]]
            at = earlier[-1] + 1 if earlier else None
            if at is None:
                break
        assert answer == (IGNORED if at is None else x[at])


def test_addition(tasks):
    task = tasks.TASKS["addition"](operands=3, digits=2)
    for tokens, answers, hops in zip(*tasks.sequences(task, "train", 100), strict=True):
        text = "".join(task.alphabet[t] for t in tokens)
        asked, rest = text.split("=")
        terms = [int(n) for n in asked.split("+")]
        told = [task.alphabet[a] for a in answers if a != IGNORED]
        assert int("".join(told)[::-1]) == sum(terms) and len(told) == 3
        assert rest.startswith("".join(told[:-1])) and set(hops[hops >= 0]) == {len(terms)}


def test_parts_and_seeds_differ_and_repeat(tasks):
    first = drawn(tasks, "register")[0]
    assert (first == drawn(tasks, "register")[0]).all()
    others = [drawn(tasks, "register", part)[0] for part in ("val", "test")]
    others.append(tasks.sequences(tasks.TASKS["register"](), "train", 50, seed=1)[0])
    assert all((first != other).any() for other in others)


@pytest.fixture
def corpus(tasks, tmp_path):
    tasks.main(["register", "--out", str(tmp_path / "c"), "--train", "20", "--val", "6"])
    return open_corpus(tmp_path / "c")


def test_batches_are_sequences_with_their_targets(tasks, corpus):
    tokens, answers, _ = drawn(tasks, "register", count=20)
    answer_of = {x.tobytes(): y for x, y in zip(tokens, answers, strict=True)}
    batches = Batches(corpus, 32, 5, seed=1)
    seen = []
    for step in range(4):  # an epoch: each once
        x, y = batches.batch(step)
        assert x.dtype == y.dtype == torch.int64
        for row, targets in zip(x.numpy(), y.numpy(), strict=True):
            assert (targets == answer_of[row.tobytes()]).all()
            seen.append(row.tobytes())
    assert sorted(seen) == sorted(answer_of)
    windows = list(evaluation_windows(corpus, "val", 32))
    held, right, _ = drawn(tasks, "register", "val", 6)
    assert all((x.numpy() == h).all() for (x, _), h in zip(windows, held, strict=True))
    assert all((y.numpy() == r).all() for (_, y), r in zip(windows, right, strict=True))
    assert len(evaluation_windows(corpus, "val", 32, 3)) == 3


def test_another_length_is_refused(corpus):
    for call in (lambda: Batches(corpus, 16, 5, 1), lambda: evaluation_windows(corpus, "val", 16)):
        with pytest.raises(UsageError, match="seq_len 16: .* are 32 tokens long"):
            call()


def test_damaged_targets_are_seen(corpus):
    path = corpus.folder / "train-targets-00000.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="train-targets-00000.bin: block 0 .* is damaged"):
        Batches(open_corpus(corpus.folder), 32, 5, 1).batch(0)
    path.write_bytes(data[:-4])
    with pytest.raises(CorruptError, match="train-targets-00000.bin: has 2556 bytes"):
        open_corpus(corpus.folder)
    path.unlink()
    with pytest.raises(CorruptError, match="train-targets-00000.bin: is missing"):
        open_corpus(corpus.folder)


def test_train_py_takes_them(train, corpus, tmp_path):
    assert train("--data", corpus.folder, "--out", tmp_path / "run", "--recurrent", "1,1,1") == 0
    code = train("--data", corpus.folder, "--out", tmp_path / "other", "--seq-len", "16")
    assert code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("register --oprations 3", "unknown flag --oprations; did you mean --operations"),
        ("register --op 3", "unknown flag --op"),  # no abbreviations
        (
            "register --operands 3",
            "--operands is not a flag of the task register, which has --states",
        ),
        (
            "addition --length 9",
            "--length is not a flag of the task addition, which has --operands",
        ),
        ("registers --hops 2", "--hops is not a flag of the task registers"),
        ("register --length two", "'two' is not a whole number"),
        ("maze", "'maze' is not one of"),
        ("hop --length 2", "--length 2: a sequence needs two letters"),
        ("register --train 1000000000", "--train 1000000000: at most 2097152"),
        ("addition --val 90000000", "--val 90000000: at most 3355443 sequences"),
        ("register --train 5 --train 6", "--train is given twice"),
    ],
)
def test_refusals_are_one_line(tasks, tmp_path, capsys, words, message):
    argv = [*words.split(), "--out", str(tmp_path / "a")]
    assert program.run("tasks.py", tasks.main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tasks.py: error: ") and message in line
    assert not (tmp_path / "a").exists()


def test_the_shortest_hop_has_an_answer(tasks):
    _, answers, _ = drawn(tasks, "hop", length=3, states=2)
    assert (answers[:, -1] != IGNORED).all()


def test_a_task_knows_its_length(tasks):
    for name, make in tasks.TASKS.items():
        assert drawn(tasks, name, count=2)[0].shape == (2, make().length), name


def test_wrong_words(tasks, tmp_path, capsys):
    with pytest.raises(UsageError, match="--operations 30: there are 23"):
        tasks.main(["register", "--out", str(tmp_path / "a"), "--operations", "30"])
    for words in (["--length", "0"], ["--states", "11"], ["--seed", "-1"], ["--val", "0"]):
        with pytest.raises(UsageError, match=f"{words[0]}: {words[1]} is out of range"):
            tasks.main(["register", "--out", str(tmp_path / "a"), *words])
    with pytest.raises(UsageError, match="--digits: 20 is out of range"):
        tasks.main(["addition", "--out", str(tmp_path / "a"), "--digits", "20"])
    with pytest.raises(UsageError, match="more tokens than characters"):
        tasks.main(["registers", "--out", str(tmp_path / "a"), "--registers", "9"])
    write = {"train": (np.zeros((2, 3), int),) * 2, "val": (np.zeros((1, 3), int),) * 2}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_sequences(tmp_path / "full", "AB", write, "none", {})
