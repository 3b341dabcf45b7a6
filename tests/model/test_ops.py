"""The table is really what the model calls: counted, and replaced by wrong operations in turn."""

import math
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from minillm.config.train import ModelConfig
from minillm.errors import UnavailableError, UsageError
from minillm.model.gpt import GPT
from minillm.ops import EAGER, OPERATIONS, REFERENCE, select
from minillm.optim.build import make_optimizers
from tests.support.broad import broad
from tests.support.generating import generated

# sandwich_norm is recurrent depth's; this model has no such block.
NAMES = [name for name in OPERATIONS if name != "sandwich_norm"]
LAYERS = 3


def config_of(**options):
    small = {"vocab_size": 17, "seq_len": 16, "n_layer": LAYERS, "n_head": 2, "d_model": 16}
    return ModelConfig(**{**small, "window": 3, **options})


def counting():
    """EAGER, and how often each of its operations has been called."""
    counts = Counter()

    def counted(name):
        def op(*args, **kwargs):
            counts[name] += 1
            return getattr(EAGER, name)(*args, **kwargs)

        return op

    return replace(EAGER, **{name: counted(name) for name in NAMES}), counts


def model_of(config, ops):
    return GPT(config, ops, generator=torch.Generator().manual_seed(0)).eval()


TOKENS = torch.arange(18).reshape(2, 9) % 17


def per_forward(config):
    """What one forward pass must call."""
    L = config.n_layer
    is_rms = config.norm == "rmsnorm"
    norms = L + 1 if is_rms else 0
    roped = config.position == "rope"
    if config.qk_norm and not roped:  # rope does it on the way
        norms += 2 * L
    return Counter(
        {
            "rms_norm": norms,
            "add_rms_norm": L if is_rms else 0,
            "rope": L if roped else 0,
            "attention": L,
            config.mlp: L if config.mlp in NAMES else 0,
        }
    )


CONFIGS = [
    {},
    {"position": "alibi"},
    {"qk_norm": True},
    {"qk_norm": True, "position": "none"},
    {"norm": "layernorm"},
    {"mlp": "geglu"},
    {"mlp": "relu2"},
    {"mlp": "gelu"},
    {"logit_softcap": 3.0, "tie_embeddings": True},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@torch.no_grad()
def test_every_call_goes_through_the_table(options):
    config = config_of(**options)
    ops, counts = counting()
    model = model_of(config, ops)
    model(TOKENS)
    expected = per_forward(config)
    assert +counts == +expected
    model(TOKENS, TOKENS)
    assert counts["linear_cross_entropy"] == 1
    assert counts["attention"] == 2 * LAYERS

    counts.clear()
    cache = model.make_cache(2)
    model.trunk(TOKENS[:, :5], cache)
    assert +counts == +expected  # the prompt is plain attention
    counts.clear()
    for t in range(5, 9):
        model.trunk(TOKENS[:, t : t + 1], cache)
    once = expected - Counter(attention=LAYERS) + Counter(decode_attention=LAYERS)
    once += Counter(rope_cache=once.pop("rope", 0))
    assert +counts == Counter({name: 4 * n for name, n in once.items()})


def test_generate_draws_through_the_table():
    ops, counts = counting()
    list(generated(model_of(config_of(), ops), [[1, 2], [3]], max_tokens=6))
    assert counts["sample"] == counts["uniform"] == 6


def muon_step(model, ops):
    parameters = dict(model.named_parameters())
    optimizers = make_optimizers("muon", parameters, model.matrices(), ops, (0.9, 0.95), 0.0)
    model(TOKENS, TOKENS).backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()


def test_muon_takes_equal_shapes_at_once():
    config = config_of(n_kv_head=1)
    ops, counts = counting()
    model = model_of(config, ops)
    muon_step(model, ops)
    # q, out (16, 16); k, v (8, 16); gate, up (64, 16); down (16, 64)
    assert counts["newton_schulz"] == 4
    assert counts["adamw"] == 1


WRONG = {
    "rms_norm": lambda x, w, eps=1e-6: x * w,
    "add_rms_norm": lambda x, residual, w, eps=1e-6: (EAGER.rms_norm(x, w, eps), x + residual),
    "rope": lambda q, k, *rest: (q, k),
    "rope_cache": lambda q, k, v, cos, *rest: EAGER.rope_cache(q, k, v, 1.1 * cos, *rest),
    "attention": lambda q, k, v, **options: EAGER.attention(q, k, v),  # forgets the window
    "decode_attention": lambda q, k, v, lengths=None, **options: EAGER.decode_attention(
        q, k, v, lengths
    ),
    "swiglu": lambda x: EAGER.swiglu(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)),
    "geglu": lambda x: EAGER.swiglu(x),
    "relu2": lambda x: x.square(),
    "linear_cross_entropy": lambda x, w, t, **options: 1.001 * EAGER.linear_cross_entropy(x, w, t),
    "adamw": lambda *args, lr, **options: EAGER.adamw(*args, lr=[2 * r for r in lr], **options),
    "newton_schulz": lambda g, steps=5, dtype=None: g,
    "sample": lambda logits, u, **options: EAGER.sample(-logits, u, **options),
    "uniform": lambda seed, rows, made: EAGER.uniform(seed + 1, rows, made),
}


@torch.no_grad()
def answers(ops, mlp):
    """Everything that runs on the table: logits, loss, cached logits, drawn tokens, a Muon step."""
    model = model_of(config_of(mlp=mlp), ops)
    for w in model.parameters():
        if w.dim() == 2:
            w.mul_(20)  # far from where start weights hide mistakes
    cache = model.make_cache(2)
    model.trunk(TOKENS[:, :5], cache)
    found = [model(TOKENS), model(TOKENS, TOKENS), model.trunk(TOKENS[:, 5:6], cache)]
    drawn = [token.id for token in generated(model, [[1, 2], [3]], max_tokens=6)]
    found.append(torch.tensor(drawn))
    with torch.enable_grad():
        muon_step(model, ops)
    return found + [w.detach() for w in model.parameters()]


def agree(these, those):
    return all(a.allclose(b, rtol=1e-4, atol=1e-4) for a, b in zip(these, those, strict=True))


@broad("name", NAMES, quick=4)
def test_a_wrong_operation_is_seen(name):
    mlp = name if name in ("geglu", "relu2") else "swiglu"
    right = answers(EAGER, mlp)
    same = replace(EAGER, **{name: lambda *args, **kw: getattr(EAGER, name)(*args, **kw)})
    assert agree(answers(same, mlp), right)
    assert not agree(answers(replace(EAGER, **{name: WRONG[name]}), mlp), right)


def test_the_reference_is_a_table_too():
    for mlp in ("swiglu", "geglu", "relu2"):
        assert agree(answers(REFERENCE, mlp), answers(EAGER, mlp))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_select(device):
    assert select("eager", device) == replace(EAGER, why="asked for")
    assert select("auto", device) == replace(EAGER, why="on a CPU")
    with pytest.raises(UsageError, match="kernels 'fast': expected auto, eager or triton"):
        select("fast", device)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({}, "no GPU; on a CPU set TRITON_INTERPRET=1"),
        ({"dropout": 0.1}, "the attention kernel has no dropout"),
        ({"d_head": 160}, "heads are at most 128 wide"),
        ({"d_model": 16400}, "rows of at most 16384"),
        ({"vocab_size": 262145}, "at most 262144 tokens"),
    ],
    ids=str,
)
def test_select_says_why_triton_cannot_run(monkeypatch, model, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr("minillm.kernels._launch.interpreted", lambda: False)
    with pytest.raises(UnavailableError, match=f"kernels triton: .*{reason}.*use kernels "):
        select("triton", "cpu", **model)


def test_select_says_what_the_compiler_says(monkeypatch):
    def fail(x, w):
        raise RuntimeError("no ptxas\nand more")

    rms_norm = pytest.importorskip("minillm.kernels.rms_norm", exc_type=ImportError)
    monkeypatch.setattr(rms_norm, "rms_norm", fail)
    with pytest.raises(UnavailableError, match="Triton fails on cpu: no ptxas; use"):
        select("triton", "cpu")
    for wrong in (1.0, math.nan):
        monkeypatch.setattr(rms_norm, "rms_norm", lambda x, w, wrong=wrong: x + wrong)
        with pytest.raises(UnavailableError, match="Triton computes wrong results on cpu"):
            select("triton", "cpu")


def test_select_triton_where_it_is_interpreted():
    pytest.importorskip("triton")
    ops = select("triton", "cpu")
    assert (ops.name, ops.why) == ("triton", "asked for")
    assert all(getattr(ops, name) is not getattr(EAGER, name) for name in NAMES)


def test_select_where_triton_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [n for n in sys.modules if n.startswith("minillm.kernels._launch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("minillm.kernels._launch", raising=False)
    with pytest.raises(UnavailableError, match="Triton is not installed .*pip install triton"):
        select("triton", "cpu")
    assert select("auto", "cpu").name == "eager"
