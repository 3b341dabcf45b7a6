"""Published checkpoints against a second model, written apart, from the equations, in their names.

The equations: Geiping et al. 2025, arXiv:2502.05171, section 3; names and shapes: see huginn.py.
"""

import json
import math
from itertools import accumulate

import pytest
import torch
from safetensors.torch import save_file

from minillm.config.model import ModelConfig
from minillm.convert import huginn
from minillm.convert.huginn import config_from, load, weights_from
from minillm.errors import CorruptError, UsageError
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys
from minillm.model.size import n_parameters
from minillm.ops import EAGER, select
from tests.support.broad import broad
from tests.support.generating import generated

C, H, D, F, V, T = 32, 4, 8, 40, 29, 24
CONFIG = {
    "model_type": "huginn_raven", "n_embd": C, "n_heads": H, "block_size": T, "vocab_size": V,
    "intermediate_size": F, "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2,
    "n_layers_in_coda": 1, "mean_recurrence": 4, "mean_backprop_depth": 2, "norm_eps": 1e-6,
    "rope_base": 50_000, "qk_bias": True, "tie_embeddings": True, "bias": False, "n_layers": 4,
    "nonlin_name": "SiLU", "torch_dtype": "bfloat16", "num_key_value_heads": H,
}  # fmt: skip
TOKENS = (torch.arange(2 * 11).reshape(2, 11) ** 2 + 3) % V


def published(config=CONFIG, seed=0) -> dict[str, torch.Tensor]:
    """Random weights under their names, norms and biases far from where training starts them."""
    parts = {"prelude": "n_layers_in_prelude", "core_block": "n_layers_in_recurrent_block",
             "coda": "n_layers_in_coda"}  # fmt: skip
    shapes = {"transformer.wte.weight": (V, C), "transformer.adapter.weight": (C, 2 * C),
              "transformer.ln_f.weight": (C,)}  # fmt: skip
    if not config["tie_embeddings"]:
        shapes["lm_head.weight"] = (V, C)
    for part, field in parts.items():
        for i in range(config[field]):
            at = f"transformer.{part}.{i}."
            shapes |= {f"{at}norm_{n}.weight": (C,) for n in (1, 2, 3, 4)}
            shapes |= {at + "attn.Wqkv.weight": (3 * C, C), at + "attn.proj.weight": (C, C)}
            shapes |= {at + "mlp.fc.weight": (2 * F, C), at + "mlp.proj.weight": (C, F)}
            if config["qk_bias"]:
                shapes[at + "attn.qk_bias"] = (2, 1, H, D)
    numbers = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=numbers, dtype=torch.float64)
        found[name] = 1 + 0.2 * w if len(shape) == 1 else w if len(shape) == 4 else w * 0.15
    found["freqs_cis"] = torch.full((1, T, 1, D // 2, 2), torch.nan)
    return found


def write(folder, tensors, config=CONFIG, files=1):
    """A folder as it is published, in one file or in shards with an index."""
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    where = {name: names[i % files] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# -- the second model: one text at a time, one head at a time, float64 -----------------------------


def norm(w, x, eps=1e-6):
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * w


def turned(x, t):
    """x: (D,), each pair of neighbours a complex number, times e^(i t base^(-2j/D))."""
    angles = [t * 50_000 ** (-2 * j / D) for j in range(D // 2)]
    turns = [[torch.tensor(f(a)).float().double() for f in (math.cos, math.sin)] for a in angles]
    z = torch.view_as_complex(x.reshape(D // 2, 2).contiguous())
    z = z * torch.stack([torch.complex(*turn) for turn in turns])
    return torch.view_as_real(z).reshape(D)


def attention(w, at, x):
    q, k, v = (x @ w[at + "attn.Wqkv.weight"].T).reshape(-1, 3, H, D).unbind(1)  # (T, H, D) each
    if at + "attn.qk_bias" in w:
        q, k = q + w[at + "attn.qk_bias"][0, 0], k + w[at + "attn.qk_bias"][1, 0]
    y = torch.zeros_like(q)
    for h in range(H):
        queries = [turned(row, t) for t, row in enumerate(q[:, h])]
        keys = [turned(row, t) for t, row in enumerate(k[:, h])]
        for t, query in enumerate(queries):
            p = torch.stack([query @ key / math.sqrt(D) for key in keys[: t + 1]]).softmax(0)
            y[t, h] = sum(p[j] * v[j, h] for j in range(t + 1))
    return y.reshape(-1, C) @ w[at + "attn.proj.weight"].T


def mlp(w, at, x):
    first, second = w[at + "mlp.fc.weight"][:F], w[at + "mlp.fc.weight"][F:]
    gate = x @ first.T
    return (gate / (1 + torch.exp(-gate)) * (x @ second.T)) @ w[at + "mlp.proj.weight"].T


def blocks(w, part, depth, x):
    for i in range(depth):
        at = f"transformer.{part}.{i}."
        n1, n2, n3, n4 = (w[f"{at}norm_{n}.weight"] for n in (1, 2, 3, 4))
        x = norm(n2, x + attention(w, at, norm(n1, x)))
        x = norm(n4, x + mlp(w, at, norm(n3, x)))
    return x


def logits_of(w, config, tokens, start, r):
    """tokens: (B, T).    start: (B, T, C).    Returns (B, T, V)."""
    prelude, core, coda = (
        config[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda")
    )
    rows = []
    for text, s in zip(tokens, start, strict=True):
        e = blocks(w, "prelude", prelude, math.sqrt(C) * w["transformer.wte.weight"][text])
        for _ in range(r):
            s = torch.cat((s, e), dim=-1) @ w["transformer.adapter.weight"].T
            s = blocks(w, "core_block", core, s)
        x = norm(w["transformer.ln_f.weight"], s)
        x = norm(w["transformer.ln_f.weight"], blocks(w, "coda", coda, x))
        rows.append(x @ w.get("lm_head.weight", w["transformer.wte.weight"]).T)
    return torch.stack(rows)


@torch.no_grad()
def distance(model, w, config, r, keys=None):
    """The largest difference of both models' logits, as a share of the largest logit."""
    start = model.begin(TOKENS, keys=keys).state
    theirs = logits_of(w, config, TOKENS, start, r)
    ours = model(TOKENS, recurrence=r, keys=keys)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# -- logits ----------------------------------------------------------------------------------------

SKELETONS = [(1, 2, 1), (2, 4, 2), (0, 1, 0)]


@broad("tied", [True, False], quick=2, ids=["tied", "untied"])
@broad("depths", SKELETONS, ids=str)
@broad("files", [1, 3], quick=(1,))
def test_same_logits(tmp_path, depths, tied, files):
    names = ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda")
    config = {**CONFIG, **dict(zip(names, depths, strict=True)), "tie_embeddings": tied}
    w = published(config)
    model = load(write(tmp_path, w, config, files), EAGER, torch.float64)
    assert model.config.depths == depths and (model.head.weight is model.embed.weight) == tied
    for r in (1, 2, 5):
        assert distance(model, w, config, r) < 1e-12
    keys = state_keys(3, torch.tensor([8, 1]))
    assert distance(model, w, config, 3, keys) < 1e-12


def test_same_logits_without_biases(tmp_path):
    config = {**CONFIG, "qk_bias": False}
    model = load(write(tmp_path, published(config), config), EAGER, torch.float64)
    assert distance(model, published(config), config, 3) < 1e-12


@pytest.mark.parametrize("dtype, share", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_narrower_weights(tmp_path, dtype, share):
    w = {name: t.bfloat16() for name, t in published().items()}
    model = load(write(tmp_path, w), EAGER, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert distance(model, {n: t.double() for n, t in w.items()}, CONFIG, 3) < share


def swap(name, rows, *starts):
    """A mistake: two equal ranges of a weight's rows change places."""

    def make(w):
        a, b = (slice(start, start + rows) for start in starts)
        w[name] = w[name].clone()
        w[name][a], w[name][b] = w[name][b].clone(), w[name][a].clone()

    return make


def exchange(one, other):
    def make(w):
        w[one], w[other] = w[other], w[one]

    return make


MISTAKES = {
    "rows of queries": swap("blocks.1.attention.qkv.weight", 1, 1, 4),
    "rows of keys": swap("blocks.2.attention.qkv.weight", 1, C + 1, C + 2),
    "rows of values": swap("blocks.0.attention.qkv.weight", 1, 2 * C, 2 * C + 4),
    "rows of a bias": swap("blocks.0.attention.k_bias", 1, 9, 12),
    "gate and factor": swap("blocks.1.mlp.up.weight", F, 0, F),
    "state and text": exchange("injection.state.weight", "injection.text.weight"),
    "both biases": exchange("blocks.3.attention.q_bias", "blocks.3.attention.k_bias"),
    "two norms": exchange("blocks.1.attention_post_norm.weight", "blocks.1.mlp_norm.weight"),
    "the last norm": exchange("norm.weight", "blocks.2.mlp_post_norm.weight"),
    "core and coda": exchange("blocks.2.mlp.down.weight", "blocks.3.mlp.down.weight"),
}


@broad("mistake", MISTAKES, quick=(0, 4, 6))
def test_a_mistake_in_the_mapping_would_be_seen(tmp_path, mistake, monkeypatch):
    def mistaken(tensors, config):
        w = weights_from(tensors, config)
        MISTAKES[mistake](w)
        return w

    monkeypatch.setattr(huginn, "weights_from", mistaken)
    model = load(write(tmp_path, published()), EAGER, torch.float64)
    assert distance(model, published(), CONFIG, 2) > 1e-2


def test_rows_left_in_their_order_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(huginn, "_halves", lambda rows, d_head: rows)
    model = load(write(tmp_path, published()), EAGER, torch.float64)
    assert distance(model, published(), CONFIG, 2) > 1e-2


def test_what_is_loaded_generates_and_learns(tmp_path):
    model = load(write(tmp_path, published()), EAGER)
    made = [
        [t.id for t in generated(model, [[1, 2, 3], [4]], max_tokens=9, temperature=0,
                                use_cache=cached, recurrence=2, recurrent_cache="full")]
        for cached in (True, False)
    ]  # fmt: skip
    assert made[0] == made[1]
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_embd": None}, "n_embd None; expected a whole number from 1"),
        ({"n_heads": 3}, "n_embd 32 is not a multiple of 2 x 3"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2; can be 4 only"),
        ({"head_dim": 16}, "head_dim 16; can be 8 only"),
        ({"n_layers_in_recurrent_block": 0}, "n_layers_in_recurrent_block 0; expected a whole"),
        ({"block_size": True}, "block_size True; expected a whole"),
        ({"model_type": "llama"}, "model_type 'llama'; can be 'huginn_raven' only"),
        ({"nonlin_name": "ReLU"}, "nonlin_name 'ReLU'; can be 'SiLU' only"),
        ({"injection_type": "add"}, "injection_type 'add'; can be 'linear' only"),
        ({"bias": True}, "bias True; can be False only"),
        ({"rope_base": "high"}, "rope_base 'high'; expected a number above 0"),
        ({"norm_eps": math.nan}, "norm_eps nan; expected a number above 0"),
        ({"qk_bias": 1}, "qk_bias 1; expected true or false"),
        ({"mean_recurrence": 5000}, "mean_recurrence 5000 is out of range"),
    ],
    ids=str,
)
def test_configurations_that_this_model_cannot_be(change, message):
    with pytest.raises(UsageError, match=f"^config.json: .*{message}"):
        config_from({**CONFIG, **change})


def test_missing_fields_are_named_or_theirs_by_default():
    for name in ("n_heads", "vocab_size", "intermediate_size", "n_layers_in_coda"):
        with pytest.raises(UsageError, match=f"{name} None"):
            config_from({n: v for n, v in CONFIG.items() if n != name})
    short = {n: v for n, v in CONFIG.items() if n[:2] == "n_" or n[-4:] == "size"}
    found = config_from({"num_attention_heads": H, **short})
    assert (found.mean_recurrence, found.backprop_depth, found.rope_base) == (32, 8, 50_000.0)
    assert found.qk_bias and found.tie_embeddings and found.norm_eps == 1e-6


def test_the_published_size():
    """3.5 billion parameters: the paper's (2, 4, 2) at width 5280."""
    sizes = {"n_embd": 5280, "n_heads": 55, "block_size": 4096, "vocab_size": 65536,
             "intermediate_size": 17920, "n_layers_in_prelude": 2,
             "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2}  # fmt: skip
    config = config_from(sizes)
    block = 4 * 5280**2 + 3 * 5280 * 17920 + 4 * 5280 + 2 * 5280
    assert n_parameters(config) == 8 * block + 2 * 5280**2 + 65536 * 5280 + 5280


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("transformer.coda.0.attn.qk_bias", None, "is missing"),
        ("transformer.wte.weight", None, "is missing"),
        ("transformer.core_block.1.norm_3.weight", None, "is missing"),
        ("transformer.core_block.2.norm_3.weight", torch.ones(C), "is unknown"),
        ("transformer.adapter.bias", torch.ones(C), "is unknown"),
        ("transformer.adapter.weight", torch.ones(2 * C, C), r"\[64, 32\], expected \[32, 64\]"),
        ("transformer.ln_f.weight", torch.ones(C).int(), "is torch.int32"),
        ("transformer.prelude.0.mlp.fc.weight", torch.full((2 * F, C), torch.inf), "not finite"),
        ("lm_head.weight", torch.ones(V, C), "is not transformer.wte.weight"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(tmp_path, name, change, message):
    w = {**published(), name: change}
    w = {n: t for n, t in w.items() if t is not None}
    with pytest.raises(CorruptError, match=f"{name} .*{message}") as caught:
        load(write(tmp_path, w), EAGER)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tied_matrix_may_have_either_name_or_both(tmp_path):
    w, config = published(), config_from(CONFIG)
    embed = w["transformer.wte.weight"]
    both = weights_from({**w, "lm_head.weight": embed.clone()}, config)
    del w["transformer.wte.weight"]
    alone = weights_from({**w, "lm_head.weight": embed}, config)
    assert torch.equal(both["embed.weight"], embed) and torch.equal(alone["embed.weight"], embed)
    assert both.keys() == alone.keys() and "head.weight" not in both


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="config.json: no such file"):
        load(tmp_path, EAGER)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UsageError, match=r"or model.safetensors.index.json; pickles are not read"):
        load(tmp_path, EAGER)
    (tmp_path / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(CorruptError, match=r"model.safetensors: "):
        load(tmp_path, EAGER)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CorruptError, match="not a JSON object"):
        load(tmp_path, EAGER)


def test_shards_that_do_not_fit_their_index(tmp_path):
    write(tmp_path, published(), files=2)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    second = tmp_path / "model-00002-of-00002.safetensors"
    name = next(n for n, file in whole.items() if file == second.name)
    broken = {
        "not in both": {n: file for n, file in whole.items() if n != name},
        "weight_map does not name": {**whole, name: "../model.safetensors"},
        f"{name}x is here or in": {**whole, name + "x": second.name},
        "no.safetensors: is missing": {**whole, "x": "no.safetensors"},
    }
    for message, where in broken.items():
        index.write_text(json.dumps({"weight_map": where}))
        with pytest.raises(CorruptError, match=message):
            load(tmp_path, EAGER)
    index.write_text(json.dumps({"weight_map": whole}))
    second.unlink()
    with pytest.raises(CorruptError, match=f"{second.name}: is missing"):
        load(tmp_path, EAGER)


# -- the biases of queries and keys ----------------------------------------------------------------

SHAPE = {"vocab_size": V, "seq_len": T, "n_head": 4, "d_model": 32, "d_ff": 24, "n_layer": 2}
WITH_BIAS = [{}, {"n_kv_head": 2, "qk_norm": True}, {"position": "alibi"},
             {"position": "none", "qk_norm": True}]  # fmt: skip


def biased(ops=EAGER, dtype=torch.float64, **options) -> GPT:
    start = torch.Generator().manual_seed(1)
    model = GPT(ModelConfig(**SHAPE, qk_bias=True, **options), ops, dtype, start).to(dtype)
    numbers = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("q_bias", "k_bias")):
                assert not p.any()  # they start at zero
                p.normal_(generator=numbers)
            elif p.dim() == 2:
                p.mul_(5)
    return model.eval()


@pytest.mark.parametrize("options", WITH_BIAS, ids=str)
@torch.no_grad()
def test_biases_are_counted_and_are_those_of_the_fused_matrix(options):
    model = biased(**options)
    assert sum(p.numel() for p in model.parameters()) == n_parameters(model.config)
    twin = GPT(ModelConfig(**SHAPE, bias=True, **options), EAGER, torch.float64).double().eval()
    twin.load_state_dict(model.state_dict() | {
        n: torch.zeros_like(w) for n, w in twin.state_dict().items() if n.endswith(".bias")
    }, strict=False)  # fmt: skip
    for block, own in zip(twin.blocks, model.blocks, strict=True):
        q, k = own.attention.q_bias, own.attention.k_bias
        block.attention.qkv.bias[: len(q) + len(k)] = torch.cat((q, k))
    assert torch.allclose(model(TOKENS), twin(TOKENS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", WITH_BIAS, ids=str)
@pytest.mark.parametrize("pieces", [(1,) * 11, (4, 1, 6)], ids=str)
@torch.no_grad()
def test_biases_while_decoding(options, pieces):
    model = biased(**options)
    cache, found = model.make_cache(2), []
    for end, n in zip(accumulate(pieces), pieces, strict=True):
        found.append(model.logits(model.trunk(TOKENS[:, end - n : end], cache)))
    assert torch.allclose(torch.cat(found, 1), model(TOKENS), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_biases_with_kernels():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, found = TOKENS.to(device), []
    for ops in (select("triton", device), EAGER):
        model = biased(ops, torch.float32, n_kv_head=2).to(device)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        with torch.no_grad():
            cache = model.make_cache(2)
            model.trunk(tokens[:, :-1], cache)
            last = model.trunk(tokens[:, -1:], cache)
        found.append([last, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 2e-4 * b.abs().max()
