"""Runs that earlier releases wrote still load, sample the same tokens and train further."""

import json
import shutil
from pathlib import Path

import pytest

from minillm.checkpoint.find import load_run, open_checkpoint
from tests.support.generating import generated

FIRST = Path(__file__).resolve().parents[1] / "golden" / "f537e8f"


@pytest.mark.parametrize("name", ["plain", "recurrent"])
def test_a_run_of_the_first_format_samples_as_it_did(name):
    expected = json.loads((FIRST / "expected.json").read_text("utf-8"))[name]
    model, tokenizer, config = load_run(FIRST / name)
    assert config.d_model == 16
    prompt = tokenizer.prompt_ids("the ")
    made = list(generated(model, [prompt], max_tokens=40, temperature=0.0))
    assert [token.id for token in made] == expected["tokens"]
    assert [token.logprob for token in made] == pytest.approx(expected["logprobs"], abs=1e-4)


@pytest.mark.parametrize("name", ["plain", "recurrent"])
def test_a_run_of_the_first_format_trains_further(train, tmp_path, name):
    """Its prepared corpus is given by name, as the machine it was made on is gone."""
    expected = json.loads((FIRST / "expected.json").read_text("utf-8"))[name]
    run = shutil.copytree(FIRST / name, tmp_path / "run")
    corpus = shutil.copytree(FIRST / "corpus", tmp_path / "corpus")
    assert train("--resume", run, "--data", corpus, "--steps", "9") == 0
    assert open_checkpoint(run).step == 9
    last = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["step"] == 9
    assert last["val_loss"] == pytest.approx(expected["val_loss_at_step_9"], abs=0.02)
