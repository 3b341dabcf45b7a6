"""train.py on several ranks, as torchrun starts it: the same losses, nothing said twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minillm.checkpoint.find import load_run, open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    "--tokenizer byte --d-model 32 --n-head 2 --seq-len 32 --n-layer 4 --batch-size 8 --threads 1 "
    "--micro-batch-size 2 --learning-rate 0.01 --eval-every 0 --log-every 1 --optimizer adamw"
).split()
CORE = "--recurrent 1,2,1 --mean-recurrence 3 --backprop-depth 2 --recurrence-groups 2".split()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Text enough, prepared once."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text((ROOT / "train.py").read_text())
    run(1, "--data", path, *MODEL, "--steps", 1, "--out", path.parent / "first")
    return path


def command(ranks: int, *flags, restarts: int = 0) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
                "--max-restarts", str(restarts), "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    start = [sys.executable] if ranks == 1 else torchrun
    return [*start, str(ROOT / "train.py"), *map(str, flags)]


def start(ranks: int, *flags, cwd: Path, restarts: int = 0, **more) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(ranks, *flags, restarts=restarts), cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def run(ranks: int, *flags, code: int = 0) -> str:
    """What a training says on standard error; torchrun's code is 0 or 1."""
    where = Path(flags[flags.index("--data") + 1]).parent
    process = start(ranks, *flags, cwd=where)
    try:
        _, said = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == code, said[-3000:]
    return said


def losses(folder: Path) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def apart(a: dict[int, float], b: dict[int, float]) -> float:
    assert a.keys() == b.keys()
    return max(abs(a[step] - b[step]) / a[step] for step in a)


@pytest.mark.parametrize(
    "dtype, shape, stages, bar",
    [
        ("fp32", CORE, (0, 1, 2, 3), 1e-5),
        ("bf16", [], (1, 3), 1e-2),
        ("fp16", [], (2,), 1e-2),
    ],
)
def test_losses_of_two_ranks_are_those_of_one(text, tmp_path, dtype, shape, stages, bar):
    flags = ["--data", text, *MODEL, *shape, "--steps", 20, "--dtype", dtype, "--save-every", 0]
    run(1, *flags, "--out", tmp_path / "one")
    for stage in stages:
        run(2, *flags, "--out", tmp_path / f"{stage}", "--zero", stage)
        assert apart(losses(tmp_path / "one"), losses(tmp_path / f"{stage}")) <= bar


def test_muon_on_two_ranks(text, tmp_path):
    flags = ["--data", text, *MODEL[:-2], "--optimizer", "muon", "--steps", 20, "--save-every", 0]
    run(1, *flags, "--out", tmp_path / "one")
    run(2, *flags, "--out", tmp_path / "two", "--zero", 2)
    assert apart(losses(tmp_path / "one"), losses(tmp_path / "two")) <= 1e-5


def pid_of_rank(rank: int, above: int) -> int:
    """The process of a rank, a child of torchrun's."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            said = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        if parent == above and f"RANK={rank}".encode() in said:
            return int(folder.name)
    raise AssertionError(f"no rank {rank}")


def until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


def reached(folder: Path, step: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.is_file() and f'"step": {step},' in path.read_text()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype, bar", [("fp32", 1e-5), ("bf16", 1e-2)])
def test_a_killed_rank_comes_back_and_one_rank_goes_on(text, tmp_path, dtype, bar):
    """From its last checkpoint, with the losses of a run that nobody disturbed, bit for bit."""
    flags = ["--data", text, *MODEL, "--dtype", dtype, "--zero", 2, "--save-every", 5]
    run(2, *flags, "--steps", 30, "--out", tmp_path / "calm")
    folder = tmp_path / "killed"
    process = start(2, *flags, "--steps", 30, "--out", folder, cwd=text.parent, restarts=1)
    try:
        until(lambda: reached(folder, 8))
        os.kill(pid_of_rank(1, process.pid), signal.SIGKILL)
        _, said = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, said[-3000:]
    assert said.count("train.py: error") <= 1 and "from step" in said
    assert losses(folder) == losses(tmp_path / "calm")
    ends = [open_checkpoint(run) for run in (folder, tmp_path / "calm")]
    for kind in ("model", "optimizer"):
        a, b = (end.tensors(kind) for end in ends)
        assert a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())

    more = ["--data", text, "--threads", 1, "--steps", 50]
    run(2, *more, "--resume", tmp_path / "calm", "--zero", 2)
    run(1, *more, "--resume", folder, "--zero", 0)
    assert apart(losses(tmp_path / "calm"), losses(folder)) <= bar
    model, _, _ = load_run(folder)
    assert model.config.n_layer == 4


@pytest.mark.skipif(os.name != "posix", reason="not on this system")
@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_on_torchrun_saves_the_step(text, tmp_path):
    """All processes of the terminal hear it, and torchrun passes it on to its ranks once more."""
    flags = ["--data", text, *MODEL, "--zero", 1, "--steps", 5000, "--save-every", 0]
    process = start(2, *flags, "--out", tmp_path / "run", cwd=text.parent, start_new_session=True)
    try:
        until(lambda: reached(tmp_path / "run", 8))
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=150)
    finally:
        process.kill()
    step = open_checkpoint(tmp_path / "run").step
    assert f"stopped by SIGINT at step {step}, which is saved" in said and step >= 8
    run(1, "--data", text, "--threads", 1, "--steps", step + 2, "--resume", tmp_path / "run",
        "--zero", 0)  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.usefixtures("default_signals")
def test_a_notice_that_one_rank_gets_saves_the_step_of_all(text, tmp_path):
    """A scheduler may signal any process of a job; here it is not the one that prints and saves."""
    flags = ["--data", text, *MODEL, "--steps", 5000, "--save-every", 0]
    process = start(2, *flags, "--out", tmp_path / "run", cwd=text.parent)
    try:
        until(lambda: reached(tmp_path / "run", 8))
        os.kill(pid_of_rank(1, process.pid), signal.SIGUSR1)
        _, said = process.communicate(timeout=150)
    finally:
        process.kill()
    step = open_checkpoint(tmp_path / "run").step
    assert f"stopped by SIGUSR1 at step {step}, which is saved" in said and step >= 8
    assert "exitcode  : 138" in said


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_survivors_leave_with_seven(text, tmp_path, how):
    """Without torchrun, whose agent would end them itself: at once, or when the time is over."""
    flags = [
        "--data",
        text,
        *MODEL,
        "--steps",
        100000,
        "--rank-timeout",
        5,
        "--out",
        tmp_path / "r",
    ]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, flags)], cwd=text.parent, text=True,
            stderr=subprocess.PIPE, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        until(lambda: reached(tmp_path / "r", 3))
        ranks[1].send_signal(how)
        begun = time.monotonic()
        _, said = ranks[0].communicate(timeout=60)
        took = time.monotonic() - begun
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 7 and took < (10 if how == signal.SIGKILL else 30)
    assert said.splitlines()[-1].startswith("train.py: error: another rank was killed")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--zero", "4"], "--zero: 4 is out of range; expected between 0 and 3"),
        (["--batch-size", "9", "--micro-batch-size", "3"], "--batch-size 9 is not a multiple of 2"),
        (["--batch-size", "4", "--recurrence-groups", "4", *CORE[:4], "--micro-batch-size", "1"],
         "--recurrence-groups 4 does not divide the 2 sequences of each of 2 ranks"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_once(text, tmp_path, flags, words):
    taken = set(flags[::2]) | set(flags)
    kept = [pair for pair in zip(MODEL[::2], MODEL[1::2], strict=True) if pair[0] not in taken]
    said = run(2, "--data", text, *(w for pair in kept for w in pair), *flags, "--steps", 2,
               "--out", tmp_path / "run", code=1)  # fmt: skip
    lines = [line for line in said.splitlines() if "train.py: error" in line]
    assert len(lines) == 1 and words in lines[0], said[-3000:]
    assert "exitcode  : 2" in said and "Traceback" not in said.split("torch/distributed")[0]


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
