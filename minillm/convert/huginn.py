"""Read checkpoints in the published layout of huginn-0125 into our model, with the same logits.

The models differ in names and in three arrangements:

    rotation   theirs turns the pairs (2j, 2j + 1) of a head, ours (j, j + D/2), so that the rows of
               queries and keys, and their biases, change places
    adapter    theirs is one matrix [state, text], ours is two
    biases     theirs of queries and keys are one tensor, ours are two

Their initial states are drawn again in each pass; ours are model.start_state, of the same
distribution. The angles of their tables are rounded to fp32 and ours are not: at position 4095 the
cosines differ by 4e-4. Files are not downloaded, pickles and their tokenizer are not read.

Source of names, shapes and defaults: github.com/seal-rg/recurrent-pretraining at commit
59e0b69b2d96a59cbbe79c9d5034d89ecb5ab6f6, recpre/raven_modeling_minimal.py and
recpre/raven_config_minimal.py; of the model: Geiping et al. 2025, arXiv:2502.05171, section 3.
Shapes: C width, H heads, D head width, F MLP width, V vocabulary.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from torch import Tensor

from minillm.config.model import ModelConfig
from minillm.errors import CorruptError, UsageError
from minillm.model.gpt import GPT
from minillm.model.positions import RotaryPositions
from minillm.ops import Ops
from minillm.runtime.files import MAX_JSON

# Whole numbers: our name, the lowest value, and their names, the second of which is an alias.
SIZES = {
    "d_model": (1, "n_embd", "hidden_size"),
    "n_head": (1, "n_heads", "num_attention_heads"),
    "seq_len": (1, "block_size"),
    "vocab_size": (1, "vocab_size"),
    "d_ff": (1, "intermediate_size"),
    "prelude": (0, "n_layers_in_prelude"),
    "core": (1, "n_layers_in_recurrent_block"),
    "coda": (0, "n_layers_in_coda"),
    "mean_recurrence": (1, "mean_recurrence"),
    "backprop_depth": (1, "mean_backprop_depth"),
}
DEFAULTS = {
    "mean_recurrence": 32,
    "mean_backprop_depth": 8,
    "norm_eps": 1e-6,
    "rope_base": 50000.0,
    "qk_bias": True,
    "tie_embeddings": True,
}
# Fixed properties of our model, under their names. A field that is absent counts as equal.
FIXED = {
    "model_type": "huginn_raven",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "state_init": "like-init",
    "bias": False,
    "test_time_noise": 0,
}
BUFFERS = ("freqs_cis",)  # (1, T, 1, D/2, 2), the tables of the rotation
PARTS = ("prelude", "core_block", "coda")
BLOCK = {
    "norm_1.weight": "attention_norm.weight",
    "attn.Wqkv.weight": "attention.qkv.weight",
    "attn.proj.weight": "attention.out.weight",
    "norm_2.weight": "attention_post_norm.weight",
    "norm_3.weight": "mlp_norm.weight",
    "mlp.fc.weight": "mlp.up.weight",  # both: first what silu takes, then its factor
    "mlp.proj.weight": "mlp.down.weight",
    "norm_4.weight": "mlp_post_norm.weight",
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load(folder: str | Path, ops: Ops, dtype: torch.dtype = torch.float32) -> GPT:
    """Return the model of a local folder, in evaluation mode.

    folder: folder with config.json and model.safetensors, or with shards and their index
    ops: table of operations
    dtype: dtype of the weights and the computation
    Raises UsageError on missing files and on properties that our model cannot have. Raises
    CorruptError on files that are damaged or do not fit together.
    """
    folder = Path(folder)
    config = config_from(_read_json(folder / "config.json"))
    tensors = _read_tensors(folder)
    try:
        weights = {name: w.to(dtype) for name, w in weights_from(tensors, config).items()}
    except CorruptError as error:
        raise CorruptError(f"{folder}: {error}") from None
    with torch.device("meta"):  # no initial weights are drawn
        model = GPT(config, ops, dtype)
    if config.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.position = RotaryPositions(config)  # its tables were made on the meta device, too
    return model.eval()


def config_from(huginn_config: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration for the content of their config.json.

    huginn_config: content of config.json
    Raises UsageError, which names the field, on properties that our model cannot have.
    """
    theirs = {**DEFAULTS, **huginn_config}
    for name, expected in FIXED.items():
        if theirs.get(name, expected) != expected:
            raise UsageError(f"config.json: {name} {theirs[name]!r}; can be {expected!r} only")
    sizes = {ours: _whole(theirs, low, *names) for ours, (low, *names) in SIZES.items()}
    C, H = sizes["d_model"], sizes["n_head"]
    if C % (2 * H):
        raise UsageError(f"config.json: n_embd {C} is not a multiple of 2 x {H}, its n_heads")
    for name, expected in {"num_key_value_heads": H, "head_dim": C // H}.items():
        if theirs.get(name, expected) != expected:
            raise UsageError(f"config.json: {name} {theirs[name]!r}; can be {expected} only")
    for name in ("norm_eps", "rope_base"):
        value = theirs[name]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UsageError(f"config.json: {name} {value!r}; expected a number above 0")
    for name in ("qk_bias", "tie_embeddings"):
        if not isinstance(theirs[name], bool):
            raise UsageError(f"config.json: {name} {theirs[name]!r}; expected true or false")
    depths = ",".join(str(sizes.pop(part)) for part in ("prelude", "core", "coda"))
    try:
        return ModelConfig(
            **sizes, recurrent=depths, recurrence_style="huginn", injection="concat",
            start_state="noise", init="takase", rope_base=float(theirs["rope_base"]),
            norm_eps=theirs["norm_eps"], qk_bias=theirs["qk_bias"],
            tie_embeddings=theirs["tie_embeddings"],
        )  # fmt: skip
    except UsageError as error:
        raise UsageError(f"config.json: {error}") from None


def weights_from(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights of our model by name, without the head's if it is tied.

    Buffers are ignored.

    tensors: their tensors by name
    config: result of `config_from`
    Raises CorruptError, which names the tensor, if one is missing, unknown, of another shape or
    dtype, or not finite.
    """
    C, H, D = config.d_model, config.n_head, config.d_head
    theirs = {name: t for name, t in tensors.items() if name not in BUFFERS}
    embed, head = "transformer.wte.weight", "lm_head.weight"
    if config.tie_embeddings:  # one of the two is there, or both
        for name, other in ((embed, head), (head, embed)):
            if other in theirs:
                theirs.setdefault(name, theirs[other])
    _check(theirs, _shapes(config))
    if config.tie_embeddings and not torch.equal(theirs[embed], theirs[head]):
        raise CorruptError(f"{head} is not {embed}, though config.json ties them")

    ours = {"embed.weight": theirs[embed], "norm.weight": theirs["transformer.ln_f.weight"]}
    if not config.tie_embeddings:
        ours["head.weight"] = theirs[head]
    state, text = theirs["transformer.adapter.weight"].split(C, dim=1)  # (C, C) each
    ours["injection.state.weight"] = state.contiguous()
    ours["injection.text.weight"] = text.contiguous()
    for i, block in enumerate(_blocks(config)):
        named = {own: theirs[block + other] for other, own in BLOCK.items()}
        q, k, v = named["attention.qkv.weight"].split(H * D)
        named["attention.qkv.weight"] = torch.cat((_halves(q, D), _halves(k, D), v))
        if config.qk_bias:
            q, k = theirs[block + "attn.qk_bias"].flatten(1)  # (H D) each
            named["attention.q_bias"], named["attention.k_bias"] = _halves(q, D), _halves(k, D)
        ours.update({f"blocks.{i}.{name}": t for name, t in named.items()})
    return ours


def _halves(rows: Tensor, d_head: int) -> Tensor:
    """Return rows, (H D, ...), reordered within each head: even ones first, then odd ones."""
    return rows.unflatten(0, (-1, d_head // 2, 2)).transpose(1, 2).flatten(0, 2)


def _blocks(config: ModelConfig) -> list[str]:
    """Return the prefix of the names of each block's tensors, in our order."""
    parts = zip(PARTS, config.depths, strict=True)
    return [f"transformer.{part}.{i}." for part, depth in parts for i in range(depth)]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, by their names."""
    C, F, V, wide = config.d_model, config.d_ff, config.vocab_size, config.n_head * config.d_head
    block = dict.fromkeys(BLOCK, (C,))
    block |= {"attn.Wqkv.weight": (3 * wide, C), "attn.proj.weight": (C, wide)}
    block |= {"mlp.fc.weight": (2 * F, C), "mlp.proj.weight": (C, F)}
    if config.qk_bias:
        block["attn.qk_bias"] = (2, 1, config.n_head, config.d_head)
    return {
        "transformer.wte.weight": (V, C),
        "transformer.adapter.weight": (C, 2 * C),
        "transformer.ln_f.weight": (C,),
        "lm_head.weight": (V, C),
        **{start + name: shape for start in _blocks(config) for name, shape in block.items()},
    }


def _check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise CorruptError(f"{name} is missing")
        t = tensors[name]
        if tuple(t.shape) != shape or t.dtype not in FLOATS:
            raise CorruptError(f"{name} is {t.dtype} {list(t.shape)}, expected {list(shape)}")
        if not torch.isfinite(t).all():
            raise CorruptError(f"{name} holds values that are not finite")
    if unknown := sorted(tensors.keys() - shapes):
        raise CorruptError(f"{unknown[0]} is unknown, or its block or bias is not in config.json")


def _whole(fields: Mapping[str, Any], low: int, *names: str) -> int:
    """Return the whole number in the first field that exists."""
    value = next((fields[name] for name in names if name in fields), None)
    if type(value) is not int or value < low:
        raise UsageError(f"config.json: {names[0]} {value!r}; expected a whole number from {low}")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise CorruptError(f"{path}: larger than {MAX_JSON >> 20} MiB")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CorruptError(f"{path}: damaged, not a JSON object")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of model.safetensors, or of the files in the index, on the CPU."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _read_file(single)
    if not index.is_file():
        raise UsageError(f"{folder}: has no {single.name} or {index.name}; pickles are not read")
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(map(_is_shard, where.values())):
        raise CorruptError(f"{index}: weight_map does not name .safetensors files of its folder")
    tensors = {}
    for file in sorted(set(where.values())):
        found = _read_file(folder / file)
        if odd := sorted({n for n, f in where.items() if f == file} ^ found.keys()):
            raise CorruptError(f"{folder / file}: {odd[0]} is here or in {index.name}, not in both")
        tensors.update(found)
    return tensors


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set("/\\\0") & set(name)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        # Read, not mapped: a mapped file that is cut off kills the process.
        return parse(path.read_bytes())
    except FileNotFoundError:
        raise CorruptError(f"{path}: is missing") from None
    except (SafetensorError, KeyError) as error:  # KeyError: a type of number torch does not have
        raise CorruptError(f"{path}: {error}") from None
