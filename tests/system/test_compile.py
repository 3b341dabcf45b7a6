"""--compile: training with a compiled model ends as training without it does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.checkpoint.find import open_checkpoint
from minillm.config.train import ModelConfig
from minillm.distributed.ranks import Ranks
from minillm.distributed.strategies import shard
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from minillm.training.setup import compiled

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "--n-head 2 --d-model 16 --seq-len 16 --mlp gelu --position learned --qk-norm".split()
FLAGS = (
    "--tokenizer byte --threads 1 --batch-size 4 --micro-batch-size 2 --steps 3 --dtype fp32 "
    "--optimizer adamw --learning-rate 0.01 --log-every 1 --eval-every 2 --eval-batches 1"
).split()


@pytest.fixture(scope="module")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the compiler keeps, for all trainings: the blocks of both shapes are the same."""
    return tmp_path_factory.mktemp("inductor")


@pytest.mark.parametrize("stage", [0, 1])
def test_a_compiled_model_is_what_training_calls(stage):
    """It has a __len__ that raises, so that its truth cannot be asked for."""
    model = GPT(ModelConfig(vocab_size=7, seq_len=4, n_layer=1, n_head=1, d_model=2), EAGER)
    forward = compiled(model, whole=True)
    with pytest.raises(TypeError):
        bool(forward)
    assert shard(model, [], Ranks(), stage, forward=forward).forward is forward
    assert shard(model, [], Ranks(), stage).forward is model


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile needs Visual C++ there")
@pytest.mark.parametrize("name", ["plain", "core"])
def test_compiled_training_comes_to_its_end(tmp_path, text_file, inductor, name):
    """On one rank and on two; with the losses of the same training uncompiled.

    Weights are not compared: AdamW turns a gradient that is only rounding into a whole step.
    """
    core = "--recurrent 0,1,0 --mean-recurrence 2 --recurrence-style parcae".split()
    shape = [*SHAPE, *(core if name == "core" else ["--n-layer", "1"])]

    def train(out: str, ranks: int, *flags: str) -> list[float]:
        several = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
        command = [sys.executable, *(several if ranks > 1 else ()), str(ROOT / "train.py")]
        command += [*FLAGS, *shape, *flags, "--data", str(text_file), "--out", out]
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(inductor), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **caches}, capture_output=True, text=True,
            timeout=580,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        rows = map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())
        assert open_checkpoint(tmp_path / out).state["progress"]["ended"]
        return [row[key] for row in rows for key in ("loss", "val_loss") if key in row]

    losses = train("eager", 1)
    for ranks in (1, 2):
        found = train(f"compiled-{ranks}", ranks, "--compile", "--final-eval-batches", "1")
        assert len(found) == len(losses) == 5
        assert found[:-1] == pytest.approx(losses[:-1], rel=1e-3)  # the last is of another part
