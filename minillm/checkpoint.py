"""A run folder and what is in it: written whole or not at all, hashed, never a pickle.

    runs/NAME/config.json, tokenizer.model|json, metrics.jsonl, samples.txt
    runs/NAME/checkpoints/step-00001000/{model,optimizer,ema}-00001-of-00001.safetensors,
                                        state.json, manifest.json

A checkpoint is written under a temporary name and renamed when everything is on the disk; its
manifest holds the SHA-256 of every file and one of itself.
"""

import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from minillm.config import ModelConfig
from minillm.errors import CorruptError, UsageError
from minillm.model import GPT
from minillm.ops import select
from minillm.storage import file_digest, read_json, sync_file, sync_folder, write_json
from minillm.tokenizer import Tokenizer, load_tokenizer

STEP = re.compile(r"step-(\d{8})")


def next_run(root: Path, name: str) -> Path:
    """The first of root/name-1, root/name-2, ... that does not exist."""
    n = 1
    while (root / f"{name}-{n}").exists():
        n += 1
    return root / f"{name}-{n}"


def newest_run(root: Path = Path("runs")) -> Path:
    """The run in `root` whose newest checkpoint is the newest. UsageError if there is none."""
    found = [(max(c.stat().st_mtime_ns for c in _steps(run).values()), run)
             for run in root.glob("*") if _steps(run)]  # fmt: skip
    if not found:
        raise UsageError(f"no run with a checkpoint in {root}/; train one with: python train.py")
    return max(found)[1]


def check_out(run: Path, overwrite: bool) -> None:
    """Raise UsageError unless `run` is free: absent, empty, or a run that may be overwritten."""
    if not run.exists():
        return
    if not run.is_dir():
        raise UsageError(f"--out {run} is a file; name a folder")
    if not any(run.iterdir()):
        return
    if not (run / "config.json").is_file():
        raise UsageError(f"--out {run} holds other things than a run; name another folder")
    if not overwrite:
        raise UsageError(f"--out {run} exists; go on with --resume {run}, or --overwrite it")


def make_run(run: Path, overwrite: bool) -> None:
    """Make an empty run folder in the place of whatever check_out lets go."""
    check_out(run, overwrite)
    if run.exists():
        shutil.rmtree(run)
    run.mkdir(parents=True)


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
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CorruptError(f"{path}: {error}") from None

    def load_into(self, model: GPT) -> None:
        """Give `model` these weights, the averaged ones where there are any."""
        kind = "ema" if "ema" in self.kinds else "model"
        load_weights(model, self.tensors(kind), self.folder)


def save(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> Path:
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
    steps = _steps(run)
    for step in sorted(steps)[:-keep_last]:
        if step != best:
            shutil.rmtree(steps[step])


def _steps(run: Path) -> dict[int, Path]:
    folders = run.glob("checkpoints/step-*/manifest.json")
    return {int(m[1]): f.parent for f in folders if (m := STEP.fullmatch(f.parent.name))}


def open_checkpoint(run: Path, which: str = "last") -> Checkpoint:
    """The checkpoint "last", "best" or of a step number, every file checked against its hash.

    Raises UsageError if there is no such run or checkpoint, CorruptError if it is damaged.
    """
    step = find_step(run, which)
    return _verified(_steps(run)[step], step)


def find_step(run: Path, which: str = "last") -> int:
    """The step of the checkpoint "last", "best" or of a number; raises as open_checkpoint."""
    steps = _steps(_as_run(run))
    if not steps:
        raise UsageError(f"{run} holds no checkpoint; train it with: python train.py --out {run}")
    step = max(steps)
    if which == "best":
        best = read_json(steps[step] / "state.json").get("best_step")
        step = step if best is None else best
    elif which != "last":
        step = int(which) if which.isdecimal() and len(which) <= 8 else -1
    if step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise UsageError(f"--checkpoint {which}: {run} holds steps {known}; or last, best")
    return step


def _as_run(run: Path) -> Path:
    if run.is_dir() and (run / "config.json").is_file():
        return run
    if run.is_dir():
        raise UsageError(f"{run} is not a run of minillm: it has no config.json")
    if run.exists():
        raise UsageError(f"{run} is a file, not a run folder; pickled checkpoints are never read")
    raise UsageError(f"{run}: no such run")


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
        owner[p].state[p][kind] = value.to(p.device)


def load_weights(model: GPT, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy `tensors` into the model. CorruptError if names, shapes or finiteness are not right."""
    expected = dict(model.named_parameters())
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which is unknown"
        raise CorruptError(f"{source}: does not fit the run's configuration: {what}")
    with torch.no_grad():
        for name, p in expected.items():
            t = tensors[name]
            if t.shape != p.shape or not t.is_floating_point():
                raise CorruptError(
                    f"{source}: {name} is {t.dtype} {list(t.shape)}, expected {list(p.shape)}"
                )
            if not torch.isfinite(t).all():
                raise CorruptError(f"{source}: {name} holds values that are not finite")
            p.copy_(t)


def read_config(run: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration and the training settings that config.json states."""
    body = read_json(_as_run(run) / "config.json")
    try:
        names = {f.name for f in fields(ModelConfig)}
        unknown = set(body["model"]) - names
        if unknown:
            raise CorruptError(f"{run}/config.json: unknown model setting {sorted(unknown)[0]!r}")
        if body["model"].get("vocab_size") is None:
            raise CorruptError(f"{run}/config.json: the model has no vocab_size")
        return ModelConfig(**body["model"]), body["train"]
    except (KeyError, TypeError, UsageError) as error:
        raise CorruptError(f"{run}/config.json: {error}") from None


def write_config(run: Path, model: ModelConfig, train: dict, facts: dict) -> None:
    """config.json: the resolved configuration and the facts of where it runs."""
    write_json(run / "config.json", {"model": asdict(model), "train": train, **facts})


def load_run(
    run: str | Path,
    *,
    checkpoint: str = "last",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
) -> tuple[GPT, Tokenizer, ModelConfig]:
    """The model of a run, ready to generate, its tokenizer and its configuration.

    The averaged weights are taken where the run has them.
    Raises UsageError if there is no such run, CorruptError if a file is damaged.
    """
    run = Path(run)
    config, _ = read_config(run)
    found = open_checkpoint(run, checkpoint)
    model = GPT(config, select(kernels, device), dtype)
    found.load_into(model)
    tokenizer = load_run_tokenizer(run, config)
    model = model.to(device).eval().requires_grad_(False)
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


def tokenizer_path(run: Path) -> Path:
    """The tokenizer's file in a run. CorruptError if it is missing or another than stated."""
    files = [p for n in ("tokenizer.model", "tokenizer.json") if (p := run / n).is_file()]
    if not files:
        raise CorruptError(f"{run}: has no tokenizer.model or tokenizer.json")
    if read_json(run / "config.json").get("tokenizer_sha256") != file_digest(files[0]):
        raise CorruptError(f"{files[0]}: is not the tokenizer that the run was trained with")
    return files[0]


def load_run_tokenizer(run: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a run. CorruptError if it does not belong."""
    path = tokenizer_path(run)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise CorruptError(
            f"{path}: {tokenizer.vocab_size} tokens, the model knows {config.vocab_size}"
        )
    return tokenizer
