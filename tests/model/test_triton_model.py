"""The model on Triton's table equals the model on eager's: loss, gradients, tokens, training.

Without a GPU the kernels are interpreted, so the models are as small as they can be.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minillm.config.train import ModelConfig
from minillm.model.gpt import GPT
from minillm.ops import EAGER, REFERENCE, Ops, select
from minillm.optim.build import make_optimizers, set_learning_rate
from minillm.training import samples
from tests.support.broad import broad
from tests.support.generating import generated

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = {"vocab_size": 50, "seq_len": 48, "n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 48}
TOKENS = ((torch.arange(2 * 41) * 7 + 3) % 50).reshape(2, 41)

CONFIGS = {
    "rope and swiglu": {},
    "grouped heads, qk-norm, window, documents": {
        "n_head": 4, "n_kv_head": 2, "d_model": 64, "qk_norm": True, "window": 9,
        "document_mask": True, "bos_id": 3,
    },
    "alibi, geglu, soft-cap, tied": {
        "position": "alibi", "mlp": "geglu", "logit_softcap": 5.0, "tie_embeddings": True,
    },
    "learned positions, relu2, one kv head": {
        "position": "learned", "mlp": "relu2", "n_kv_head": 1,
    },
    "recurrent, huginn": {"recurrent": "1,1,1", "mean_recurrence": 2},
    "recurrent, parcae": {
        "recurrent": "1,1,1", "mean_recurrence": 2, "recurrence_style": "parcae",
    },
    "layernorm, gelu, biases, qk-norm": {
        "norm": "layernorm", "mlp": "gelu", "bias": True, "position": "sinusoidal", "qk_norm": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def triton_ops() -> Ops:
    return select("triton", DEVICE)


def model_of(ops: Ops, dtype: torch.dtype = torch.float32, **options) -> GPT:
    start = torch.Generator().manual_seed(5)
    model = GPT(ModelConfig(**{**SHAPE, **options}), ops, dtype, start)
    with torch.no_grad():
        for w in model.parameters():
            if w.dim() == 2 and "recurrent" not in options:  # whose iterations amplify rounding
                w.mul_(5)  # far from where start weights hide mistakes
    return model.to(DEVICE)


def loss_and_gradients(model: GPT, forward=None) -> dict[str, Tensor]:
    tokens = TOKENS.to(DEVICE)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    loss = (model if forward is None else forward)(tokens[:, :-1], targets)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def expected(
    norm="rmsnorm", mlp="swiglu", position="rope", qk_norm=False, recurrent=None,
    recurrence_style="huginn", **_,
) -> Counter:  # fmt: skip
    """How often each kernel runs in one step of two layers: nothing falls back to eager."""
    found = Counter({"_attention_fwd_kernel": 2, "_linear_cross_entropy_kernel": 1})
    found.update({f"_attention_{n}_bwd_kernel": 2 for n in ("delta", "dkdv", "dq")})
    if recurrent:  # four blocks are passed, and the last norm twice
        found = Counter({name: n * 2 if "attention" in name else n for name, n in found.items()})
        sandwich = recurrence_style == "huginn"
        for way in ("fwd", "bwd"):
            # Parcae's injection has a norm of its own; a sandwich's middle two are one kernel.
            norms = 4 * 2 + 2 + (not sandwich)
            found.update({f"_rms_norm_{way}_kernel": norms, f"_rope_{way}_kernel": 4,
                          f"_swiglu_{way}_kernel": 4})  # fmt: skip
            if sandwich:
                found[f"_sandwich_norm_{way}_kernel"] = 4
        return found
    rope, gated = position == "rope", mlp in ("swiglu", "geglu", "relu2")
    # Two norms a block and the last; of q and k where no rotation takes their norm along.
    norms = 5 * (norm == "rmsnorm") + 4 * (qk_norm and not rope)
    for way in ("fwd", "bwd"):
        each = {"rms_norm": norms, "rope": 2 * rope, "swiglu": 2 * gated}
        found.update({f"_{op}_{way}_kernel": n for op, n in each.items() if n})
    return found


def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], share: float) -> None:
    """Each tensor's rms difference is at most `share` of its own rms (the loss: of itself)."""
    for name, y in theirs.items():
        error = (ours[name] - y).square().mean().sqrt()
        assert error <= share * y.square().mean().sqrt() + 1e-9, f"{name}: {error:.3g}"


@broad("name", CONFIGS, quick=(1, 4))
def test_loss_and_gradients(triton_ops, launches, name):
    ours = loss_and_gradients(model_of(triton_ops, **CONFIGS[name]))
    assert launches == expected(**CONFIGS[name])
    theirs = loss_and_gradients(model_of(EAGER, **CONFIGS[name]))
    alike(ours, theirs, 2e-5)


def test_in_bf16_no_further_from_fp32_than_the_reference(triton_ops):
    options = {"n_kv_head": 1, "qk_norm": True}
    exact = loss_and_gradients(model_of(EAGER, **options))
    theirs = loss_and_gradients(model_of(REFERENCE, torch.bfloat16, **options))
    ours = loss_and_gradients(model_of(triton_ops, torch.bfloat16, **options))
    for name, y in exact.items():
        error, allowed = ((x[name] - y).square().mean().sqrt() for x in (ours, theirs))
        unit = torch.finfo(torch.bfloat16).eps * y.square().mean().sqrt()
        assert error <= 1.5 * allowed + unit, f"{name}: {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.slow
def test_torch_compile_takes_the_whole_model_as_one_graph(triton_ops):
    model = model_of(triton_ops, n_kv_head=2, qk_norm=True)
    plain = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    alike(loss_and_gradients(model, compiled), plain, 1e-6)


@broad("options", [{}, {"position": "alibi", "window": 9}], quick=(1,), ids=str)
def test_the_same_tokens(triton_ops, options):
    """Prompts of two lengths: ragged rows in the cache, and beyond the context's end."""
    drawn = []
    for ops in (triton_ops, EAGER):
        model = model_of(ops, seq_len=10, **options).eval()
        made = generated(model, [[1, 2, 3, 4, 5], [7]], max_tokens=8, top_k=20, top_p=0.9, seed=3)
        drawn.append([(token.row, token.id) for token in made])
    assert drawn[0] == drawn[1] and len({id for _, id in drawn[0]}) > 5


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimisers_move_alike(triton_ops, name):
    moved = []
    for ops in (triton_ops, EAGER):
        model = model_of(ops)
        parameters = dict(model.named_parameters())
        optimizers = make_optimizers(name, parameters, model.matrices(), ops, (0.9, 0.95), 0.1)
        set_learning_rate(optimizers, 0.01)
        numbers = torch.Generator().manual_seed(0)
        for _ in range(2):
            for p in parameters.values():
                p.grad = torch.randn(p.shape, generator=numbers).to(DEVICE)
            for optimizer in optimizers:
                optimizer.step(grad_scale=torch.tensor(0.5, device=DEVICE))
        moved.append({n: p.detach() for n, p in parameters.items()})
    alike(*moved, 1e-5)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.slow
def test_train_to_the_same_losses(triton_ops, train, tmp_path, launches, monkeypatch):
    """`TRITON_INTERPRET=1 python train.py --kernels triton`, a few steps, fp32: within 1e-4."""
    monkeypatch.setattr(samples, "SAMPLE_TOKENS", 5)  # of 200: interpreted, they take a minute
    flags = ("--steps", "4", "--eval-every", "0", "--final-eval-batches", "1")
    shape = ("--n-head", "2", "--d-model", "32", "--seq-len", "32", "--optimizer", "adamw")
    for kernels in ("triton", "eager"):
        code = train("--kernels", kernels, "--out", tmp_path / kernels, *flags, *shape)
        assert code == 0
    ours, theirs = losses(tmp_path / "triton"), losses(tmp_path / "eager")
    assert len(ours) == 4 and ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0]
    assert launches["_adamw_kernel"] == 4
