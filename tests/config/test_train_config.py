"""ModelConfig: what is derived, what is refused and how; every preset is a valid one."""

from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given, strategies as st

from minillm.config.model import GATED, MLPS
from minillm.config.presets import PRESETS
from minillm.config.train import ModelConfig, TrainConfig
from minillm.errors import UsageError
from minillm.model.size import n_parameters


def test_a_made_config_has_everything():
    config = ModelConfig(n_head=6, d_model=384)
    assert (config.d_head, config.n_kv_head) == (64, 6)
    assert config.d_ff == 1024  # 8/3 x 384, a multiple of 64 already
    assert ModelConfig(d_model=128, n_head=4).d_ff == 384  # 341.3 up to a multiple of 64
    assert ModelConfig(mlp="relu2").d_ff == 4 * 384
    assert ModelConfig(d_head=10, n_head=7).d_head == 10


def test_a_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        ModelConfig().n_layer = 3


@given(st.sampled_from(MLPS), st.integers(1, 4096))
def test_the_mlp_is_as_wide_as_promised(mlp, width):
    config = ModelConfig(mlp=mlp, d_model=2 * width, n_head=1)
    if mlp in GATED:
        assert config.d_ff % 64 == 0
        assert 0 <= config.d_ff - 8 * 2 * width / 3 < 64
    else:
        assert config.d_ff == 4 * 2 * width


REFUSED = [
    ({"n_head": 7, "d_model": 128}, "--n-head 7 does not divide --d-model 128; nearest: 8"),
    ({"n_head": 6, "n_kv_head": 4}, "--n-kv-head 4 does not divide --n-head 6; nearest: 3"),
    ({"n_head": 6, "n_kv_head": 12}, "--n-kv-head 12 does not divide --n-head 6; nearest: 6"),
    ({"d_model": 9, "n_head": 3}, "--position rope needs an even --d-head; got 3"),
    (
        {"d_model": 9, "n_head": 3, "position": "sinusoidal"},
        "--position sinusoidal needs an even --d-model; got 9",
    ),
    ({"init": "zero", "tie_embeddings": True}, "init zero would zero the embedding"),
    ({"n_layer": 0}, "--n-layer 0 is out of range; expected between 1 and 10000"),
    ({"n_layer": 10001}, "--n-layer 10001 is out of range"),
    ({"vocab_size": 0}, "--vocab-size 0 is out of range"),
    ({"seq_len": -1}, "--seq-len -1 is out of range"),
    ({"window": -1}, "--window -1 is out of range; expected at least 0"),
    ({"dropout": 1.0}, "--dropout 1.0 is out of range; expected between 0 and 0.99"),
    ({"dropout": float("nan")}, "--dropout nan is out of range"),
    ({"logit_softcap": -1.0}, "--logit-softcap -1.0 is out of range"),
    ({"rope_base": 0.5}, "--rope-base 0.5 is out of range; expected at least 1"),
    ({"position": "rotary"}, "--position 'rotary' is not one of rope, learned"),
    ({"mlp": "silu"}, "--mlp 'silu' is not one of"),
    ({"norm": ""}, "--norm '' is not one of rmsnorm, layernorm"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=str)
def test_refusals_name_the_flag(options, message):
    with pytest.raises(UsageError) as refusal:
        ModelConfig(**options)
    assert message in refusal.value.with_flags()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    model_names = {f.name for f in fields(ModelConfig)}
    train_names = {f.name for f in fields(TrainConfig)}
    preset = PRESETS[name]
    assert set(preset) <= model_names | train_names
    model = ModelConfig(**{n: v for n, v in preset.items() if n in model_names})
    TrainConfig(**{n: v for n, v in preset.items() if n in train_names})
    assert model.seq_len and model.n_layer


def test_presets_have_the_sizes_they_are_named_for():
    def millions(name, vocab_size):
        names = {f.name for f in fields(ModelConfig)}
        values = {n: v for n, v in PRESETS[name].items() if n in names}
        return n_parameters(ModelConfig(**{**values, "vocab_size": vocab_size})) / 1e6

    for name, vocab_size in (("nano", 4096), ("tiny", 8192), ("small", 32768),
                             ("medium", 32768), ("large", 32768)):  # fmt: skip
        twin = millions(f"{name}-recurrent", vocab_size)
        assert twin == pytest.approx(millions(name, vocab_size), rel=0.01), name
    assert 9 < millions("tiny", 256) < 16
    assert 110 < millions("small", 32768) < 190
    assert 300 < millions("medium", 32768) < 500
    assert 800 < millions("large", 32768) < 1500
