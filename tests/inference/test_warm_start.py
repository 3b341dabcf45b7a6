"""A warm start: the core begins each new token where the one before it ended."""

import math

import pytest
import torch

from minillm.config.sampling import ExitRule
from minillm.config.train import ModelConfig
from minillm.convert.huginn import load
from minillm.errors import UsageError
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys
from minillm.ops import EAGER
from tests.convert.test_huginn import CONFIG, C, D, H, mlp, norm, published, write
from tests.support.broad import broad
from tests.support.generating import generated

SHAPE = {"vocab_size": 31, "seq_len": 24, "n_head": 2, "d_model": 16, "d_ff": 24}
PROMPTS = [[5, 7, 1, 2], [3], [9, 9, 30, 4, 8, 2]]
NEVER = ExitRule("latent", 0.0, 0)


def model_of(style: str = "huginn", start: str = "noise") -> GPT:
    config = ModelConfig(
        **SHAPE, recurrent="1,2,1", mean_recurrence=3, recurrence_style=style, start_state=start
    )
    model = GPT(config, EAGER, torch.float32, torch.Generator().manual_seed(3)).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)  # so that distributions differ from token to token
    return model


def ids_of(model: GPT, prompts, **options) -> list[list[int]]:
    options = {"max_tokens": 30, "temperature": 0.0, "warm_start": True, "recurrence": 2} | options
    rows = [[] for _ in prompts]
    for token in generated(model, prompts, **options):
        rows[token.row].append(token.id)
    return rows


@torch.no_grad()
def oracle(model: GPT, prompt: list[int], r: int, count: int) -> list[int]:
    """By hand: the prompt at once, then a token at a time, its state handed on."""
    cache = model.make_cache(1, recurrence=r)
    (prelude, core, coda), kept, found = model.config.depths, None, []
    core_blocks, tokens = range(prelude, prelude + core), torch.tensor([prompt])
    for _ in range(count):
        inputs, x = model.embed_tokens(tokens, cache)
        x = model.run(range(prelude), x, inputs)
        text = model.injection.prepare(x)
        s = model.start_state(x, None, inputs) if kept is None else kept
        for i in range(r):
            s = model.run(core_blocks, model.injection(s, text), inputs, i)
        kept = s[:, -1:] if model.config.recurrence_style == "parcae" else model.norm(s[:, -1:])
        y = model.run(range(prelude + core, prelude + core + coda), model.norm(s), inputs)
        cache.advance(tokens.shape[1])
        found.append(int(model.logits(model.norm(y))[0, -1].argmax()))
        tokens = torch.tensor([found[-1:]])
    return found


def turned_heads(x, t: int):
    """x: (H, D), each pair of neighbours a complex number, times e^(i t base^(-2j/D))."""
    angles = torch.tensor([t * 50_000 ** (-2 * j / D) for j in range(D // 2)], dtype=torch.float64)
    turn = torch.complex(angles.cos(), angles.sin())
    return torch.view_as_real(torch.view_as_complex(x.reshape(H, D // 2, 2)) * turn).reshape(H, D)


def next_logits(w, config, token: int, at: int, start, r: int, past: dict):
    """The second model of test_huginn.py, one token further: its logits, (V,), and the state that
    the published implementation starts the next one from.

    at: where the token stands.    start: (C,).    past: keys and values of each block, of the core
    in each iteration, (H, D) a token; those of this one are added.
    """

    def block(name, i, x):
        n1, n2, n3, n4 = (w[f"{name}norm_{n}.weight"] for n in (1, 2, 3, 4))
        q, k, v = (norm(n1, x) @ w[name + "attn.Wqkv.weight"].T).reshape(3, H, D)
        q, k = q + w[name + "attn.qk_bias"][0, 0], k + w[name + "attn.qk_bias"][1, 0]
        q, k = (turned_heads(x, at) for x in (q, k))
        keys, values = past.setdefault((name, i), ([], []))
        keys.append(k)
        values.append(v)
        scores = torch.einsum("hd,thd->ht", q, torch.stack(keys)) / math.sqrt(D)
        y = torch.einsum("ht,thd->hd", scores.softmax(-1), torch.stack(values)).reshape(-1)
        x = norm(n2, x + y @ w[name + "attn.proj.weight"].T)
        return norm(n4, x + mlp(w, name, norm(n3, x)))

    text, s = math.sqrt(C) * w["transformer.wte.weight"][token], start
    for i in range(config["n_layers_in_prelude"]):
        text = block(f"transformer.prelude.{i}.", 0, text)
    for step in range(r):
        s = torch.cat((s, text)) @ w["transformer.adapter.weight"].T
        for i in range(config["n_layers_in_recurrent_block"]):
            s = block(f"transformer.core_block.{i}.", step, s)
    kept = x = norm(w["transformer.ln_f.weight"], s)
    for i in range(config["n_layers_in_coda"]):
        x = block(f"transformer.coda.{i}.", 0, x)
    return norm(w["transformer.ln_f.weight"], x) @ w["transformer.wte.weight"].T, kept


@broad("r", [1, 2, 4, 8], quick=(1,))
@torch.no_grad()
def test_huginn_hands_on_what_the_published_implementation_does(tmp_path, r):
    """42 tokens of greedy decoding in float64, all of them, and with an exit rule as well."""
    config = {**CONFIG, "block_size": 64}
    w = {n: t for n, t in published(config).items() if n != "freqs_cis"}
    w["transformer.wte.weight"] *= 4  # else it is one token for ever
    model = load(write(tmp_path, w, config), EAGER, torch.float64)
    prompt, count = [3, 11, 28, 7, 7], 42
    keys = state_keys(0, torch.tensor([0]))
    starts = model.begin(torch.tensor([prompt]), keys=keys).state[0]
    past: dict = {}
    for at, token in enumerate(prompt):
        logits, kept = next_logits(w, config, token, at, starts[at], r, past)
    theirs = [int(logits.argmax())]
    while len(theirs) < count:
        at = len(prompt) + len(theirs) - 1
        logits, kept = next_logits(w, config, theirs[-1], at, kept, r, past)
        theirs.append(int(logits.argmax()))
    for rule in (None, NEVER) if r == 2 else (None,):
        ours = ids_of(model, [prompt], recurrence=r, max_tokens=count, exit_rule=rule)[0]
        assert ours == theirs, r
    assert len(set(theirs)) > 5


@pytest.mark.parametrize("style", ["huginn", "parcae"])
def test_against_an_oracle(style):
    model = model_of(style, start="zero")
    ours = [ids_of(model, [prompt], max_tokens=15)[0] for prompt in PROMPTS]
    assert ours == [oracle(model, prompt, 2, 15) for prompt in PROMPTS]
    cold = [ids_of(model, [prompt], max_tokens=15, warm_start=False)[0] for prompt in PROMPTS]
    assert cold != ours  # it is another computation


@broad(
    "options",
    [
        {},
        {"recurrent_cache": "slot"},
        {"exit_rule": NEVER},
        {"exit_rule": ExitRule("confidence", 0.4, 0)},
    ],
    quick=(0, 2),
    ids=str,
)
def test_a_batch_gives_what_each_row_gives_alone(options):
    """Also past seq_len, where rows are read anew one by one, and after one has ended."""
    model = model_of()

    def stop(row: int, ids: list[int]) -> bool:
        return row == 1 and len(ids) == 9

    together = ids_of(model, PROMPTS, stop=stop, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = ids_of(model, [prompt], samples=[row], **options)[0]
        assert together[row] == alone[: len(together[row])]
    assert [len(row) for row in together] == [30, 9, 30]


def test_a_rule_that_never_holds_changes_nothing():
    model = model_of()
    assert ids_of(model, PROMPTS, exit_rule=NEVER) == ids_of(model, PROMPTS)


def test_where_it_cannot_be():
    flat = GPT(ModelConfig(**SHAPE, n_layer=1), EAGER)
    for model, options in ((flat, {"recurrence": None}), (model_of(), {"use_cache": False})):
        with pytest.raises(UsageError, match="^warm_start: "):
            ids_of(model, PROMPTS, **options)
