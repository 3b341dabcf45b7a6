"""Recurrent depth does what it is for: trained at four iterations, deeper with sixteen."""

import importlib.util
from pathlib import Path

import pytest
import torch

from minillm.checkpoint.find import load_run
from minillm.runtime import program
from minillm.scripts import train as script

FILE = Path(__file__).resolve().parents[2] / "data" / "tasks.py"
TASK = {"states": 3, "operations": 5, "length": 24}
COMMON = (
    "--d-model 48 --n-head 4 --d-ff 128 --mlp swiglu --qk-norm --rope-base 1000 --optimizer muon "
    "--learning-rate 0.01 --min-learning-rate 0.0003 --weight-decay 0.01 --schedule wsd "
    "--decay-fraction 0.3 --warmup 50 --batch-size 32 --steps 550 --dtype fp32 --threads 1 "
    "--eval-every 0 --log-every 100 --seed 0"
).split()
RECURRENT = "--recurrent 1,1,1 --init zero --mean-recurrence 4 --max-recurrence 12".split()


@torch.no_grad()
def accuracy(run: Path, tasks, at: list[int]) -> dict[int, list[float]]:
    """By recurrence, the share of right answers after 0, 1, 2, ... hops of a chain."""
    model, _, _ = load_run(run)
    task = tasks.register(**TASK, chain=True)
    tokens, answers, _ = map(torch.from_numpy, tasks.sequences(task, "test", 512))
    readings = model.readings(tokens, at) if at else [(1, model.trunk(tokens), None)]
    return {
        r: (model.logits(x).argmax(-1) == answers).float().mean(0).tolist() for r, x, _ in readings
    }


@pytest.mark.slow
@pytest.mark.skipif(not FILE.is_file(), reason="the source tree is not here")
def test_more_iterations_answer_over_more_hops(tmp_path):
    """The register machine of benchmarks/recurrence, small: chance is a third."""
    spec = importlib.util.spec_from_file_location("tasks", FILE)
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    sizes = [word for name, size in TASK.items() for word in (f"--{name}", str(size))]
    tasks.main(["register", "--out", str(tmp_path / "corpus"), *sizes, "--train", "18000"])
    for name, flags in (("recurrent", RECURRENT), ("fixed", ["--n-layer", "3", "--init", "zero"])):
        words = ["--data", tmp_path / "corpus", "--out", tmp_path / name, *COMMON, *flags]
        assert program.run("train.py", script.main, [str(w) for w in words]) == 0
    ours = accuracy(tmp_path / "recurrent", tasks, [1, 4, 16])
    fixed = accuracy(tmp_path / "fixed", tasks, [])[1]
    told = {r: [round(a, 2) for a in by_hop] for r, by_hop in {**ours, "fixed": fixed}.items()}
    assert ours[4][6] >= 0.85, told
    assert ours[16][12] >= 0.80, told
    assert ours[1][12] <= 0.5 and ours[4][12] <= 0.5, told  # iterations it is, not weights
    assert fixed[12] <= 0.5, told
