"""What every test stands on: one thread, seeded numbers, and memory in which nothing was written
holds NaN, so that a read of it shows. Kernels are interpreted where there is no GPU."""

import importlib.util
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from minillm.data.shards import is_prepared
from minillm.runtime import device, files, launch, ownership, program, signals
from minillm.scripts import train as train_script
from minillm.training import samples

if not torch.cuda.is_available():  # before any kernel is defined: they are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("triton") is None:  # as on Windows and macOS: eager alone is tested
    others = {"test_eager.py", "test_reference.py"}
    collect_ignore = ["test_triton_model.py", "profiling/test_audit.py", "profiling/test_sass.py"]
    folder = Path(__file__).with_name("kernels")
    collect_ignore += [str(p) for p in folder.glob("test_*.py") if p.name not in others]
settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --update-messages, with which a test rewrites the wording of all refusals."""
    parser.addoption("--update-messages", action="store_true",
                     help="rewrite tests/golden/messages.txt")  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, the tests of kernels run on it, and are those of `-m gpu`."""
    for item in items:
        if torch.cuda.is_available() and {"device", "triton_ops"} & set(item.fixturenames):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def generator() -> torch.Generator:
    """The same numbers in every run."""
    return torch.Generator().manual_seed(1337)


@pytest.fixture(autouse=True)
def commands_of_a_checkout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have messages name the scripts of a checkout, also where a wheel is tested.

    test_launch.py tests how commands are named.
    """
    if request.path.name != "test_launch.py":
        monkeypatch.setattr(launch, "_started", lambda verb: ("python", f"{verb}.py"))


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like hand out NaN (integers: the lowest there is)."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args, **kwargs) -> Tensor:
        x = make(*args, **kwargs)
        if x.dtype == torch.bool:
            return x
        floating = x.is_floating_point() or x.is_complex()
        with torch.no_grad():
            return x.fill_(torch.nan if floating else torch.iinfo(x.dtype).min)

    return poisoned


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """The one rule of tolerance: no_worse(ours, yardstick, truth), the results of one computation.

    Against the truth in float64, each of ours errs at most 1.5 times as much as the yardstick, a
    plain computation in the same dtype, plus one unit in the last place of the largest value: among
    the results, or `on_the_way`, where larger ones cancel. In float64, where the yardstick is the
    truth, that unit is 1e-12.
    """

    def check(
        ours: Sequence[Tensor],
        yardstick: Sequence[Tensor],
        truth: Sequence[Tensor],
        on_the_way: float = 0.0,
    ) -> None:
        scale = max(on_the_way, *(x.abs().max().item() for x in truth))
        for y, plain, exact in zip(ours, yardstick, truth, strict=True):
            assert y.dtype == plain.dtype and exact.dtype == torch.float64
            assert y.shape == plain.shape == exact.shape
            unit = 1e-12 if y.dtype == torch.float64 else torch.finfo(y.dtype).eps
            allowed = 1.5 * (plain.double() - exact).abs().max() + unit * scale
            error = (y.double() - exact).abs().max()
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each Triton kernel was launched in this test, counted inside Triton itself."""
    from triton.runtime import jit
    from triton.runtime.interpreter import GridExecutor

    counts: Counter = Counter()
    interpreted, compiled = GridExecutor.__call__, jit.JITFunction.run

    def count_interpreted(self, *args, **kwargs):
        counts[self.fn.__name__] += 1
        return interpreted(self, *args, **kwargs)

    def count_compiled(self, *args, **kwargs):
        counts[self.fn.__name__] += 1
        return compiled(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", count_interpreted)
    monkeypatch.setattr(jit.JITFunction, "run", count_compiled)
    return counts


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Let this process and its children receive all signals that ask them to end.

    Where pytest runs in the background, or under nohup, some of them are ignored.
    """
    found = {n: signal.getsignal(n) for n in (signal.SIGINT, *signals.ENDING)}
    ignored = [number for number, handler in found.items() if handler is signal.SIG_IGN]
    for number in ignored:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


TINY = {
    "--tokenizer": "byte", "--val-fraction": "0.1", "--n-layer": "1", "--n-head": "2",
    "--d-model": "16", "--seq-len": "16", "--batch-size": "4", "--steps": "8", "--threads": "1",
    "--dtype": "fp32", "--log-every": "1", "--eval-every": "4", "--eval-batches": "2",
}  # fmt: skip


SAMPLED = 20  # tokens of each sample, of 200: more than the 16 that a context holds


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 6 kB of sentences of ten words, the same on every machine."""
    numbers = random.Random(0)
    words = "the cat sat on a mat and dogs ran far".split()
    lines = [" ".join(words[int(numbers.random() * 10)] for _ in range(8)) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(".\n".join(lines) + ".\n", encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="session")
def train(text_file: Path) -> Callable[..., int]:
    """train(*flags) -> exit code: train.py in this process, tiny where the flags say nothing.

    Keyword arguments replace parts of it: world, steps, evaluate, write.

    The machine's peak, which takes 0.2 s to time (test_device.py does), is set to 10 GFLOP/s, and
    samples are short: they took longer than all else.
    """

    def run(*flags: str | Path, **replaced: object) -> int:
        words = [str(flag) for flag in flags]
        if "--resume" in words and not {"--data", "--val", "--cache-dir"} & set(words):
            words += _cache_of_a_copy(words[words.index("--resume") + 1 :], text_file)
        if "--resume" not in words:
            tiny = {**TINY, "--data": text_file, "--cache-dir": text_file.parent / "prepared"}
            if {"--epochs", "--time-limit", "--config"} & set(words):
                del tiny["--steps"]
            if "--init-from" in words:
                for flag in ("--tokenizer", "--n-layer", "--n-head", "--d-model", "--seq-len"):
                    del tiny[flag]
            if "--recurrent" in words:
                del tiny["--n-layer"]
            if "--data" in words and is_prepared(words[words.index("--data") + 1]):
                for flag in ("--tokenizer", "--val-fraction", "--seq-len"):
                    del tiny[flag]
            words += [str(w) for pair in tiny.items() if pair[0] not in words for w in pair]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "measured_peak_flops", lambda device, dtype: 1e10)
            patch.setattr(samples, "SAMPLE_TOKENS", min(SAMPLED, samples.SAMPLE_TOKENS))
            return program.run("train.py", partial(train_script.main, **replaced), words)

    return run


def _cache_of_a_copy(words: list[str], text_file: Path) -> list[str]:
    """Flags that lead to the prepared text of a run that was copied without it, if it was.

    words: after --resume, of which the first may be a run.
    """
    run = Path(words[0]) if words else None
    if run is None or not ownership.is_run(run):
        return []
    facts = files.read_json(run / "config.json")
    stated = [facts.get("corpus"), facts["train"].get("data") if facts["train"] else None]
    if any(isinstance(path, str) and Path(run, path).exists() for path in stated):
        return []
    return ["--cache-dir", str(text_file.parent / "prepared")]


@pytest.fixture(scope="session")
def tiny_run(train: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 8 steps, with averaged weights; copy it to change it.

    It has checkpoints 4 and 8, has seen bytes, and its folder's name has a space.
    """
    run = tmp_path_factory.mktemp("runs") / "tiny run"
    assert train("--out", run, "--ema", "0.9", "--save-every", "4", "--sample-every", "4") == 0
    return run
