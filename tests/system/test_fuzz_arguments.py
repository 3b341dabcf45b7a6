"""Random command lines and configuration files: a configuration, or one line that refuses.

Everything runs up to the resolved configuration, with no model and no corpus: what would begin
then is replaced by `Reached`. 10,000 cases in all:

    pytest tests/system/test_fuzz_arguments.py -m slow -s

Without -m slow it is an eightieth of them. They are drawn alike in every run.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from minillm.commands import plan, prepare, profile
from minillm.flags import (
    plan as plan_flags,
    prepare as prepare_flags,
    profile as profile_flags,
    sample as sample_flags,
    train as train_flags,
)
from minillm.inference import language_model
from minillm.runtime import program
from minillm.scripts import sample, train as train_script
from tests.support.argument_lists import Case, cases

SHARE = 0.3  # of the cases, at least, that reach a configuration
FULL = 10_000
PARTS = {"train.py": 0.5, "sample.py": 0.15, "minillm plan": 0.2, "minillm prepare": 0.07,
         "minillm profile": 0.08}  # fmt: skip


class Reached(Exception):  # noqa: N818
    """The configuration is whole, and work would begin."""


def reach(*args, **kwargs):
    raise Reached


def sample_main(argv: Sequence[str]) -> None:
    """sample.py up to the model, then what is checked when generation begins."""
    try:
        sample.main(argv)
    except Reached:
        args = sample_flags.parser().parse(argv)
        for prompt in sample.prompts(args):
            assert isinstance(prompt, str)
        assert sample_flags.sampling_of(args).seed == args.seed
        raise


MAINS: dict[str, tuple[Callable, Callable]] = {
    "train.py": (train_script.main, train_flags.parser),
    "sample.py": (sample_main, sample_flags.parser),
    "minillm plan": (plan.main, plan_flags.parser),
    "minillm prepare": (prepare.main, prepare_flags.parser),
    "minillm profile": (profile.main, profile_flags.parser),
}


@pytest.fixture
def place(tiny_run, tmp_path, monkeypatch) -> dict[str, str]:
    """A folder to stand in, and what {t} and {run} mean; nothing that takes time is done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on a mat\n" * 20)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "nano-1").symlink_to(tiny_run)
    (tmp_path / "good.json").write_text('{"steps": 3}')
    monkeypatch.setattr(train_script, "train", reach)
    monkeypatch.setattr(language_model, "load_run", reach)
    monkeypatch.setattr(prepare, "prepare", reach)
    monkeypatch.setattr(profile.machine, "about", reach)
    check_names, gpu = profile.tune.check, torch.device("cuda")
    monkeypatch.setattr(profile.tune, "check", lambda names, device: check_names(names, gpu))
    monkeypatch.setattr(plan.hardware.device, "set_threads", lambda wish: (1, ""))
    monkeypatch.setattr(plan.hardware.device, "measured_peak_flops", lambda device, dtype: 1e10)
    monkeypatch.setattr(
        plan.hardware.ceilings, "ceilings", lambda *args, **more: {"memory_gbps": 10.0}
    )
    # It builds a model of shapes alone.
    monkeypatch.setattr(plan.plan_fit.activations, "activation_line", lambda *_, **more: (1e6, 1e5))
    monkeypatch.setattr("sys.stdin", io.StringIO("a line\n"))
    return {"{t}": str(tmp_path), "{run}": str(tiny_run)}


def outcome(name: str, case: Case, place: dict[str, str]) -> str:
    """`valid`, `shown` (--help) or the exit code of a refusal, after a look at what it said."""
    argv = list(case.argv)
    for short, long in place.items():
        argv = [word.replace(short, long) for word in argv]
    if case.file is not None:
        data = case.file
        data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        Path(f"c.{case.ending}").write_bytes(data)
    reached = []

    def body(words: Sequence[str]) -> None:
        try:
            MAINS[name][0](words)
            reached.append("")
        except Reached:
            reached.append("")

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program.run(name, body, argv)
    said = err.getvalue()
    if code == 0:
        return "valid" if reached else "shown"
    assert code in (2, 3, 4, 5), said
    assert out.getvalue() == ""
    line = said.removesuffix("\n").split("\n")[-1]
    assert line.startswith(f"{name}: error: "), said
    assert line.isprintable() and len(line) <= 500 and said.count("error: ") >= 1, said
    assert len(line) > len(f"{name}: error: ") + 8, said
    return str(code)


def run(name: str, n: int, place: dict[str, str]) -> Counter:
    """n cases of one command; what came of them."""
    counts: Counter = Counter()
    parser = MAINS[name][1]()
    takes_config = any(action.dest == "config" for action in parser._actions)

    @settings(max_examples=n, suppress_health_check=list(HealthCheck))
    @given(cases(parser, takes_config))
    def one(case: Case) -> None:
        counts[outcome(name, case, place)] += 1

    one()
    return counts


def check(n: int, place: dict[str, str]) -> None:
    """n cases over all commands: enough of them valid, enough refused, nothing begun."""
    before, total = set(Path().iterdir()), Counter()
    for name, part in PARTS.items():
        counts = run(name, round(part * n), place)
        share = counts["valid"] / counts.total()
        print(
            f"\n{name}: {counts.total()} cases, {share:.0%} valid, {dict(sorted(counts.items()))}"
        )
        assert share >= SHARE / 2 and counts["2"] >= 0.1 * counts.total()
        total += counts
    share = total["valid"] / total.total()
    print(f"\nall: {total.total()} cases, {share:.0%} valid")
    assert total.total() >= n and share >= SHARE
    made = {path.name for path in set(Path().iterdir()) - before}
    assert made <= {"c.json", "c.toml", "c.yaml"}


def test_random_arguments(place):
    check(FULL // 80, place)


@pytest.mark.slow
def test_ten_thousand_random_arguments(place):
    check(FULL, place)
