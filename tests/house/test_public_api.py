"""The names that programs import: shared/design/interface.md, "From Python"."""

import inspect
from dataclasses import FrozenInstanceError, is_dataclass

import pytest
import torch

from minillm.checkpoint.find import load_run
from minillm.config.train import PRESETS, ModelConfig, TrainConfig
from minillm.config.sampling import SamplingParams
from minillm.inference.generate import generate
from minillm.model.gpt import GPT
from minillm.ops import Ops, select


def test_configurations_are_frozen_and_presets_are_settings_of_theirs():
    for made, name in ((ModelConfig(), "n_layer"), (TrainConfig(), "seed")):
        assert is_dataclass(made)
        with pytest.raises(FrozenInstanceError):
            setattr(made, name, 1)
    known = ModelConfig.__dataclass_fields__.keys() | TrainConfig.__dataclass_fields__.keys()
    assert {"nano", "tiny", "small", "medium", "large"} <= PRESETS.keys()
    assert all(preset.keys() <= known for preset in PRESETS.values())


def test_select_gives_a_table_of_operations():
    cpu = torch.device("cpu")
    auto = select("auto", cpu)
    assert isinstance(auto, Ops) and auto.attention is select("eager", cpu).attention


def test_a_model_is_called_for_logits_or_a_loss():
    model = GPT(ModelConfig(vocab_size=11, seq_len=8, n_layer=1, n_head=2, d_model=16),
                select("auto", torch.device("cpu")))  # fmt: skip
    tokens = torch.arange(10).view(2, 5)
    logits = model(tokens)
    loss = model(tokens, tokens)
    assert logits.shape == (2, 5, 11) and loss.shape == ()
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    )


def test_a_run_is_loaded_and_continued(tiny_run):
    for name in (tiny_run, str(tiny_run)):
        model, tokenizer, config = load_run(name)
        assert isinstance(model, GPT) and isinstance(config, ModelConfig)
    made = generate(model, [tokenizer.encode("the ")], SamplingParams(max_tokens=3, temperature=0.0))
    assert inspect.isgenerator(made)
    assert [token.row for token in made] == [0, 0, 0]
