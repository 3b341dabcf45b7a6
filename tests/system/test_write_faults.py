"""Every system call of a save and of preparing a corpus, and every fault that can befall it."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from minillm.checkpoint import placing
from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.write import prune, save, tidy
from minillm.config.train import ModelConfig
from minillm.data import prepare as corpus, shards
from minillm.data.tokenizer import train_tokenizer
from minillm.runtime.files import bytes_digest
from minillm.training.reporter import Reporter
from tests.support.faults import attempt, calls_of, points

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each fault has its own process")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Here what survives a loss of power is kept account of, not tried."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def inject(
    tmp_path: Path,
    before: Callable[[Path], object],
    work: Callable[[Path], object],
    check: Callable[[Path, str], None],
    capsys: pytest.CaptureFixture,
    kinds: frozenset[str] | None = None,
) -> int:
    """check(folder, outcome) after work(folder) has met with each fault at each of its calls.

    before: makes the folder anew for each. Returns and prints how many points there were.
    """
    template, root = tmp_path / "template", tmp_path / "root"
    template.mkdir()
    before(template)
    shutil.copytree(template, root)
    calls = calls_of(root, lambda: work(root))
    chosen = [p for p in points(calls) if kinds is None or p[1] in kinds]
    outcomes: Counter[str] = Counter()
    for at, kind in chosen:
        shutil.rmtree(root)
        shutil.copytree(template, root)
        outcome = attempt(root, lambda: work(root), at, kind)
        outcomes[outcome] += 1
        try:
            check(root, outcome)
        except Exception as error:
            raise AssertionError(f"{kind} at call {at}, {calls[at]}: {outcome}") from error
    with capsys.disabled():
        told = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
        print(f"\n{len(calls)} calls, {len(chosen)} points: {told}")
    assert outcomes["killed"] and outcomes["failed"] or kinds is not None
    return len(chosen)


def tensors(value: float) -> dict:
    """A checkpoint that can be told from others."""
    w = torch.full((40, 30), value)
    return {"model": {"w": w, "b": w[0, 0].clone()}, "optimizer": {"exp_avg.w": -w}}


def value_of(run: Path) -> float | None:
    """What the last checkpoint holds; None if there is none. Every byte of all is verified."""
    value = None
    for step in sorted(RunFolder(run).checkpoints()):
        found = open_checkpoint(run, str(step))
        held = {kind: found.tensors(kind) for kind in found.kinds}
        value = float(held["model"]["b"])
        for kind, named in tensors(value).items():
            assert all(torch.equal(held[kind][name], t) for name, t in named.items())
    return value


class Case(NamedTuple):
    """Checkpoints (step, value) that are there; what is done; which value that leads to."""

    there: list[tuple[int, float]]
    work: Callable[[Path], object]
    after: float
    least: int


def save_and_prune(run: Path) -> None:
    save(run, 3, tensors(3.0), {})
    prune(run, 1, best=None)


SAVES = {
    "the first": Case([], lambda run: save(run, 1, tensors(1.0), {}), 1.0, 180),
    "with pruning": Case([(1, 1.0), (2, 2.0)], save_and_prune, 3.0, 260),
    "the same step again": Case([(2, 2.0)], lambda run: save(run, 2, tensors(2.5), {}), 2.5, 210),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVES)
def test_the_last_good_checkpoint_loads(tmp_path, capsys, name):
    there, work, after, least = SAVES[name]
    past = there[-1][1] if there else None

    def before(run: Path) -> None:
        (run / "config.json").touch()
        for step, value in there:
            save(run, step, tensors(value), {})

    def check(run: Path, outcome: str) -> None:
        good = {after} if outcome == "done" else {past, after}
        found = value_of(run)
        assert found in good
        tidy(run)
        assert not list(run.rglob("*.tmp"))
        assert value_of(run) in ({found, after} if found is None else {found})
        work(run)  # and again, with whatever is left there
        assert value_of(run) == after and not list(run.rglob("*.tmp"))

    assert inject(tmp_path, before, work, check, capsys) >= least


@pytest.mark.slow
def test_tidying_loses_nothing(tmp_path, capsys):
    def before(run: Path) -> None:
        """Killed between the two renames of a save; another save had not come so far."""
        (run / "config.json").touch()
        for step in (1, 2):
            save(run, step, tensors(float(step)), {})
        kept = run / "checkpoints"
        shutil.copytree(kept / "step-00000002", kept / ".step-00000002.tmp")
        shutil.copytree(kept / "step-00000001", kept / ".step-00000001.gone.tmp")
        (kept / ".step-00000001.gone.tmp" / "state.json").unlink()
        (kept / "step-00000002").rename(kept / ".step-00000002.old.tmp")
        (run / "metrics.jsonl.tmp").touch()

    def check(run: Path, outcome: str) -> None:
        assert value_of(run) == 2.0
        tidy(run)
        assert value_of(run) == 2.0 and not list(run.rglob("*.tmp"))
        assert sorted(RunFolder(run).checkpoints()) == [1, 2]

    assert inject(tmp_path, before, tidy, check, capsys) >= 120


def begin(root: Path) -> None:
    """What train.py does before the first step."""
    run, held = placing.make_run(str(root / "run"), "nano", True)
    model = ModelConfig(vocab_size=257, seq_len=8, n_layer=1, n_head=2, d_model=16)
    tokenizer = train_tokenizer("byte", [])
    tokenizer.save(run)
    RunFolder(run).write_config(model, {}, {"tokenizer_sha256": tokenizer.sha256})
    held.close()


@pytest.mark.slow
@pytest.mark.parametrize("there", [False, True], ids=["new", "in the place of another"])
def test_a_run_can_always_be_resumed_or_overwritten(tmp_path, capsys, there):
    def before(root: Path) -> None:
        if there:
            begin(root)
            for step in (1, 2):
                save(root / "run", step, tensors(float(step)), {})

    def check(root: Path, outcome: str) -> None:
        run = root / "run"
        if run.exists() and RunFolder(run).checkpoints():
            assert value_of(run) == 2.0
        if not there and (run / "config.json").exists():  # it is a run, and can be gone on with
            RunFolder(run).tokenizer()
        begin(root)
        save(run, 1, tensors(5.0), {})
        RunFolder(run).tokenizer()
        assert value_of(run) == 5.0 and not list(root.rglob("*.tmp"))

    assert inject(tmp_path, before, begin, check, capsys) >= 120


def test_the_log_is_cut_back_or_whole(tmp_path, capsys):
    rows = [json.dumps({"step": step, "loss": 2.5}) + "\n" for step in range(1, 9)]

    def before(run: Path) -> None:
        (run / "metrics.jsonl").write_text("".join(rows) + '{"step')

    def check(run: Path, outcome: str) -> None:
        text = (run / "metrics.jsonl").read_text()
        assert text in ("".join(rows[:4]), "".join(rows) + '{"step')
        Reporter(run / "metrics.jsonl", 4, 9, 1.0, 1.0).close()
        assert (run / "metrics.jsonl").read_text() == "".join(rows[:4])
        tidy(run)
        assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]

    def cut(run: Path) -> None:
        Reporter(run / "metrics.jsonl", 4, 9, 1.0, 1.0).close()

    assert inject(tmp_path, before, cut, check, capsys) >= 45


@pytest.mark.slow
@pytest.mark.parametrize("kind, empty", [("byte", False), ("byte", True), ("bpe", False)])
def test_a_corpus_is_whole_or_absent(tmp_path, capsys, text_file, kind, empty):
    """empty: its folder is there, with nothing in it."""
    how = corpus.Preparation(
        tokenizer=kind, val_fraction=0.1, shard_tokens=2000, workers=1,
        vocab_size=320 if kind == "bpe" else None,
    )  # fmt: skip
    prepare = partial(corpus.prepare, [str(text_file)], how, say=lambda text: None)
    key = prepare(out=tmp_path / "undisturbed").key

    def work(root: Path) -> corpus.Corpus:
        return prepare(out=root / "cache" / "words")

    def verify(found: corpus.Corpus) -> None:
        assert found.key == key and found.tokens["train"] > 1000
        for shard in (shard for each in found.shards.values() for shard in each):
            data = shard.path.read_bytes()
            blocks = [data[i : i + shards.BLOCK] for i in range(0, len(data), shards.BLOCK)]
            assert tuple(map(bytes_digest, blocks)) == shard.sha256

    def check(root: Path, outcome: str) -> None:
        place = root / "cache" / "words"
        assert shards.is_prepared(place) or outcome != "done"
        if place.exists() and (any(place.iterdir()) or not empty):
            verify(shards.open_corpus(place))
        verify(work(root))
        assert [path.name for path in (root / "cache").iterdir()] == ["words"]

    kinds = frozenset({"kill before", "kill after", "power cut"}) if kind == "bpe" else None

    def before(root: Path) -> None:
        if empty:
            (root / "cache" / "words").mkdir(parents=True)

    count = inject(tmp_path, before, work, check, capsys, kinds)
    assert count >= (120 if kinds else 280)
