"""What a backward keeps, counted without computing: the same as counted by running."""

import pytest
import torch

from minillm.config.train import ModelConfig
from minillm.model.gpt import GPT
from minillm.model.size import n_block_matrix_parameters
from minillm.ops import EAGER
from minillm.planning import activations
from minillm.planning.activations import activation_bytes
from minillm.training import microbatch
from tests.support.broad import broad

CPU = torch.device("cpu")
TINY = {"vocab_size": 50, "seq_len": 16, "n_layer": 4, "n_head": 2, "d_model": 32}
SHAPES = [
    {},
    {"n_kv_head": 1, "mlp": "relu2", "qk_norm": True},
    {"norm": "layernorm", "position": "learned", "tie_embeddings": True, "bias": True},
    {"recurrent": "1,1,1", "mean_recurrence": 2, "backprop_depth": 5},
    {"recurrent": "1,2,0", "recurrence_style": "parcae", "mean_recurrence": 3, "backprop_depth": 4},
]


@broad("dtype, again", [(torch.float32, False), (torch.bfloat16, True)], quick=(1,), ids=str)
@broad("shape", SHAPES, quick=(3,), ids=str)
def test_as_counted_by_running(shape, again, dtype):
    config = ModelConfig(**{**TINY, **shape})
    model = GPT(config, EAGER, dtype)
    model.checkpointing = again
    one, two = (microbatch._bytes_at_most(model, rows, CPU) for rows in (1, 2))
    assert activation_bytes(config, 1, dtype, again=again) == pytest.approx(one, abs=1)
    assert activation_bytes(config, 5, dtype, again=again) == pytest.approx(
        one + 4 * (two - one), abs=4
    )


def test_narrow_parameters_need_no_copies():
    """What of bf16 copies of the weights is kept: of all matrices but the embedding."""
    config = ModelConfig(**TINY)
    wide, narrow = (
        activation_bytes(config, 1, torch.bfloat16, narrow=narrow) for narrow in (False, True)
    )
    blocks = 2 * config.n_layer * n_block_matrix_parameters(config)
    assert wide - narrow >= blocks
    # Beside them: copies of the head's matrix and of the norms, and the head's gradient.
    assert wide - narrow <= blocks + (2 + 4) * 50 * 32 + 2 * 5 * 32


def test_fused_attention_keeps_no_scores():
    config = ModelConfig(**{**TINY, "seq_len": 256})
    plain, fused = (
        activation_bytes(config, 1, torch.bfloat16, fused=fused) for fused in (False, True)
    )
    # Plain products in bf16 keep the weights of the pairs that they compute, for each layer and
    # head: 128 queries at a time see 128 or 256 keys, 192 on average. Fused ones keep a number of
    # fp32 for each row.
    assert plain - fused == 4 * 2 * 256 * (192 * 2 - 4)


def test_a_large_model_is_counted_and_a_bottomless_one_left(monkeypatch):
    config = ModelConfig(**{**TINY, "d_model": 8192, "vocab_size": 10**6, "n_layer": 10_000})
    assert activation_bytes(config, 64, torch.bfloat16) > 64 * 16 * 8192
    looped = ModelConfig(**TINY, recurrent="1,1,1")
    monkeypatch.setattr(activations, "DEEPEST", 2)
    assert activation_bytes(looped, 64, torch.bfloat16) is None
