"""Checkpoints of several ranks in use: real processes, one killed; what the two scripts do."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.keep import CheckpointKeeper
from minillm.checkpoint.schema import Progress
from minillm.checkpoint.sharded_safetensors import key_of
from minillm.checkpoint.write import save
from minillm.config.train import ModelConfig, TrainConfig
from minillm.distributed.ranks import Ranks
from minillm.distributed.strategies import shard
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from minillm.optim.build import recipes
from minillm.optim.ema import Average
from minillm.optim.schedule import Schedule
from minillm.runtime import program
from minillm.scripts import sample
from minillm.training.setup import Setup
from minillm.training.snapshot import restore, snapshot
from minillm.training.state import TrainState
from tests.support.optimizer_states import optimizer_tensors
from tests.support.thread_ranks import together, well

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "checkpoint_ranks.py"


def launch(size: int, *words: str) -> list[list[dict]]:
    """The objects that each of `size` processes of SCRIPT prints, a line each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    place |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    started = []
    try:
        for rank in range(size):
            own = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command, pipe = [sys.executable, str(SCRIPT), *words], subprocess.PIPE
            started.append(subprocess.Popen(command, env=own, stdout=pipe, stderr=pipe, text=True))
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    for process, (_, err) in zip(started, said, strict=True):
        assert process.returncode == 0, err
    return [[json.loads(line) for line in out.splitlines()] for out, _ in said]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a file's size is Linux's")
def test_two_processes(tmp_path):
    (tmp_path / "config.json").touch()
    (first, end), (second,) = launch(2, str(tmp_path))
    for found in (first, second):
        assert found["model"] and found["state"] and found["step"] == 3.0
        # The file of rank 1 did not fit: nothing of checkpoint 2 is left, 1 stands.
        assert found["after a full disk"] == ["step-00000001"]
        assert found["again"] == 1.0 and found["passed over"] == 1
        assert found["asked for"][0] == "CorruptError" and "good: 1" in found["asked for"][1]
    assert second["full"][0] == "OSError" and "File too large" in second["full"][1]
    kind, text = first["full"]
    assert kind == "UnavailableError" and text.startswith("rank 1 failed: OSError: ")
    assert first["damaged"] == second["damaged"] and first["damaged"][0] == "CorruptError"
    assert "optimizer-00002-of-00002.safetensors: damaged" in first["damaged"][1]
    assert end == {"failed": True, "left": [1]}


def test_what_all_ranks_have_alike_is_shared_out(tmp_path):
    """A checkpoint of three ranks, restored by one and by two."""
    shape = ModelConfig(vocab_size=11, seq_len=8, n_layer=1, n_head=2, d_model=16)
    plan = Schedule("constant", 0.01, 0.0, 0, 0.0, ((0, 0.0), (9, 1.0)))
    config = TrainConfig(optimizer="muon", ema=0.5, keep_last=1)
    fixed = {"threads": 1, "dtype": "fp32", "micro_batch_size": 2}

    def trained(ranks, steps: int, seed: int = 0) -> tuple[Setup, TrainState]:
        model = GPT(shape, EAGER, generator=torch.Generator().manual_seed(seed))
        parameters = dict(model.named_parameters())
        sharding = shard(
            model, recipes("muon", parameters, model.matrices(), EAGER, (0.9, 0.95), 0.1), Ranks()
        )
        sharding.ranks = ranks  # threads need no process group, as they send no gradients
        average = Average(parameters, 0.5)
        for _ in range(steps):
            tokens = torch.arange(16).view(2, 8) % 11
            model(tokens, tokens).backward()
            sharding.step(None)
            average.update(1)
        setup = Setup(
            config=config, corpus=None, batches=None, sharding=sharding, decided=fixed,
            micro_batch=2,
        )  # fmt: skip
        progress = Progress(step=steps)
        return setup, TrainState(progress=progress, schedule=plan, average=average)

    (tmp_path / "config.json").touch()
    for steps in (1, 2):
        done = well(together(3, lambda ranks, n=steps: _saved(tmp_path, *trained(ranks, n))))
    setup, state = done[0]
    past = open_checkpoint(tmp_path)
    assert past.step == 2 and len(list((tmp_path / "checkpoints").iterdir())) == 1
    for kind in ("model", "optimizer", "ema"):  # no tensor twice, and none of the ranks idle
        held = [name for path in past.files[kind] for name in load_file(path)]
        assert len(past.files[kind]) == 3 and sorted(held) == past.names(kind)
        assert all(load_file(path) for path in past.files[kind])

    def restored(ranks) -> tuple[Setup, TrainState]:
        setup, state = trained(ranks, 0, seed=1)
        restore(setup, state, open_checkpoint(tmp_path, ranks=ranks))
        return setup, state

    for size in (1, 2):
        for other, its in well(together(size, restored)):
            for a, b in zip(setup.model.parameters(), other.model.parameters(), strict=True):
                assert torch.equal(a, b)
            assert its.average.weights.keys() == state.average.weights.keys()
            for name, x in state.average.weights.items():
                assert torch.equal(x, its.average.weights[name])
            parameters = [dict(x.model.named_parameters()) for x in (setup, other)]
            both = setup.sharding.optimizers, other.sharding.optimizers
            for one, two in zip(*both, strict=True):
                states = [
                    optimizer_tensors([o], {p: name for name, p in named.items()})
                    for o, named in zip((one, two), parameters, strict=True)
                ]
                assert states[0] and states[0].keys() == states[1].keys()
                assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def _saved(run: Path, setup: Setup, state: TrainState) -> tuple[Setup, TrainState]:
    keeper = CheckpointKeeper(
        run, setup.ranks, partial(snapshot, setup, state, run), state.progress
    )
    assert keeper.save(state.progress, final=True)
    return setup, state


@pytest.fixture
def sharded_run(tiny_run, tmp_path) -> Path:
    """The tiny run, its last checkpoint saved by three ranks in parts."""
    run = shutil.copytree(tiny_run, tmp_path / "sharded")
    past = open_checkpoint(run)
    shapes = {name: list(t.shape) for name, t in past.tensors("model").items()}

    def share(ranks):
        tensors = {kind: {} for kind in past.kinds}
        for kind in past.kinds:
            for name, t in past.tensors(kind).items():
                cuts = [t.numel() * r // ranks.size for r in (ranks.rank, ranks.rank + 1)]
                part = {key_of(name, *cuts): t.view(-1)[slice(*cuts)]}
                tensors[kind] |= part if t.dim() else {name: t}
        state = {k: x for k, x in past.state.items() if k != "version"}
        save(run, past.step, tensors, {**state, "shapes": shapes}, ranks)

    well(together(3, share))
    assert len(list(run.glob("checkpoints/step-00000008/*-of-00003.safetensors"))) == 9
    return run


def test_one_process_samples_and_resumes_what_several_saved(tiny_run, sharded_run, train, capsys):
    texts = []
    for run in (tiny_run, sharded_run):
        flags = [str(run), "--prompt", "the", "--max-tokens", "12", "--json"]
        assert program.run("sample.py", sample.main, flags) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]
    plain = shutil.copytree(tiny_run, sharded_run.with_name("plain"))
    for run in (plain, sharded_run):
        assert train("--resume", run, "--steps", "10") == 0
    one, other = (open_checkpoint(run) for run in (plain, sharded_run))
    assert one.step == other.step == 10 and "shapes" not in other.state
    for kind in ("model", "optimizer", "ema"):
        a, b = one.tensors(kind), other.tensors(kind)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
