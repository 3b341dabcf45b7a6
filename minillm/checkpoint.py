"""Checkpoints: written whole or not at all, hashed, never a pickle.

    runs/NAME/checkpoints/step-00001000/{model,optimizer,ema}-00001-of-00001.safetensors,
                                        state.json, manifest.json

A checkpoint is written under a temporary name and renamed when everything is on the disk; its
manifest holds the SHA-256 of every file and one of itself.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from torch.optim import Optimizer

from minillm.config import ModelConfig
from minillm.errors import CorruptError, UsageError
from minillm.model import GPT
from minillm.ops import select
from minillm.runs import checkpoints_of, load_run_tokenizer, read_config, require_run
from minillm.storage import file_digest, read_json, sync_file, sync_folder, write_json
from minillm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint; tensors are read when asked for."""

    folder: Path
    step: int
    state: dict[str, Any]
    kinds: frozenset[str]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """The tensors of "model", "optimizer" or "ema", on the CPU."""
        path = self.folder / f"{kind}-00001-of-00001.safetensors"
        try:
            # Read, not mapped: a mapped file that is cut off takes the process along.
            return load(path.read_bytes())
        except (SafetensorError, OSError) as error:
            raise CorruptError(f"{path}: {error}") from None

    def load_into(self, model: GPT) -> None:
        """Give `model` these weights, the averaged ones where there are any."""
        kind = "ema" if "ema" in self.kinds else "model"
        load_weights(model, self.tensors(kind), self.folder)


def save(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, ranks=None) -> Path:
    """Write checkpoint `step`; afterwards it is whole or absent.

    tensors: kind ("model", "optimizer", "ema") -> name -> tensor.    state: JSON.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for kind, named in tensors.items():
        named = {name: t.detach().cpu().contiguous() for name, t in named.items()}
        save_file(named, temporary / f"{kind}-00001-of-00001.safetensors", {"format": "pt"})
    write_json(temporary / "state.json", {"step": step, **state})
    files = {}
    for path in sorted(temporary.iterdir()):
        sync_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    write_json(temporary / "manifest.json", {"files": files})
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
    sync_folder(final.parent)
    return final


def prune(run: Path, keep_last: int, best: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and step `best`."""
    steps = checkpoints_of(run)
    for step in sorted(steps)[:-keep_last]:
        if step != best:
            shutil.rmtree(steps[step])


def open_checkpoint(run: Path, which: str = "last", ranks=None) -> Checkpoint:
    """The checkpoint "last", "best" or of a step number, every file checked against its hash.

    Raises UsageError if there is no such run or checkpoint, CorruptError if it is damaged.
    """
    step = find_step(run, which)
    return _verified(checkpoints_of(run)[step], step)


def newest_settings(run: Path) -> dict[str, Any]:
    """What a resumed run may change, as the newest checkpoint has it."""
    steps = checkpoints_of(require_run(run))
    return read_json(steps[max(steps)] / "state.json")["settings"] if steps else {}


def find_step(run: Path, which: str = "last") -> int:
    """The step of the checkpoint "last", "best" or of a number; raises as open_checkpoint."""
    steps = checkpoints_of(require_run(run))
    if not steps:
        raise UsageError(
            f"{run} holds no checkpoint; train it anew: python train.py --out {run} --overwrite"
        )
    step = max(steps)
    if which == "best":
        best = read_json(steps[step] / "state.json")["progress"]["best_step"]
        step = step if best is None else best
    elif which != "last":
        step = int(which) if which.isdecimal() and len(which) <= 8 else -1
    if step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise UsageError(f"--checkpoint {which}: {run} holds steps {known}; or last, best")
    return step


def _verified(folder: Path, step: int) -> Checkpoint:
    files = read_json(folder / "manifest.json")["files"]
    for name, stated in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != stated["bytes"]:
            raise CorruptError(f"{path}: missing or not {stated['bytes']} bytes long")
        if file_digest(path) != stated["sha256"]:
            raise CorruptError(f"{path}: damaged, its SHA-256 is not the manifest's")
    state = read_json(folder / "state.json")
    if state["step"] != step:
        raise CorruptError(f"{folder}: holds step {state['step']}")
    kinds = frozenset(name.split("-")[0] for name in files if name.endswith(".safetensors"))
    return Checkpoint(folder, step, state, kinds)


def optimizer_tensors(optimizers: list[Optimizer], names: dict[Tensor, str]) -> dict[str, Tensor]:
    """Every tensor of the optimisers' states, named KIND.PARAMETER."""
    return {
        f"{kind}.{names[p]}": value if torch.is_tensor(value) else torch.tensor(value)
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for kind, value in state.items()
    }


def load_optimizer_tensors(
    optimizers: list[Optimizer], parameters: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    """Give each parameter's optimiser the state that optimizer_tensors took from it."""
    owner = {
        p: optimizer for optimizer in optimizers for g in optimizer.param_groups
        for p in g["params"]
    }  # fmt: skip
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in parameters:
            raise CorruptError(f"optimizer state of {name}, which the model does not have")
        p = parameters[name]
        # Counts of steps stay on the CPU, where reading one waits for nothing.
        owner[p].state[p][kind] = value.to(p.device) if value.dim() else value


def load_weights(model: GPT, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy `tensors` into the model; raises as load_into."""
    load_into(dict(model.named_parameters()), tensors, source)


@torch.no_grad()
def load_into(own: dict[str, Tensor], tensors: dict[str, Tensor], source: Path) -> None:
    """Copy `tensors` into those of the same names.

    Raises CorruptError if names or shapes are not the same or a value is not finite.
    """
    missing, extra = sorted(own.keys() - tensors), sorted(tensors.keys() - own.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which is unknown"
        raise CorruptError(f"{source}: does not fit the run's configuration: {what}")
    for name, mine in own.items():
        t = tensors[name]
        if t.shape != mine.shape or not t.is_floating_point():
            raise CorruptError(
                f"{source}: {name} is {t.dtype} {list(t.shape)}, expected {list(mine.shape)}"
            )
        if not torch.isfinite(t).all():
            raise CorruptError(f"{source}: {name} holds values that are not finite")
        mine.copy_(t)


def load_run(
    run: str | Path,
    *,
    checkpoint: str = "last",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
) -> tuple[GPT, Tokenizer, ModelConfig]:
    """The model of a run, ready to generate, its tokenizer and its configuration.

    dtype: of the weights and the computation. The averaged weights are taken where there are any.
    Raises UsageError if there is no such run, CorruptError if a file is damaged.
    """
    run = Path(run)
    config, _ = read_config(run)
    found = open_checkpoint(run, checkpoint)
    ops = select(
        kernels, device,
        d_model=config.d_model, d_head=config.d_head, vocab_size=config.vocab_size,
    )  # fmt: skip
    model = GPT(config, ops, dtype)
    found.load_into(model)
    tokenizer = load_run_tokenizer(run, config)
    model = model.to(device).eval().requires_grad_(False)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    if model.head.weight.device.type == "cpu":
        _store_by_columns(model)
    return model, tokenizer, config


def _store_by_columns(model: GPT) -> None:
    """Keep each matrix's columns, not its rows, together in memory; the values stay.

    A CPU multiplies one row by such a matrix 1.5 to 2.5 times faster, and more rows no slower:
    that is decoding (benchmarks/README.md).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
