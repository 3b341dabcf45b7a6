"""Checkpoints: written whole or not at all (saving.py), hashed, never a pickle.

    runs/NAME/checkpoints/step-00001000/{model,optimizer,ema}-00001-of-00001.safetensors,
                                        state.json, manifest.json

A checkpoint is written under a temporary name and renamed when everything is on the disk; its
manifest holds the SHA-256 of every file and one of itself. Each of N ranks writes a file
KIND-0000R-of-0000N of what it has, and any number of ranks reads it, each what it needs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.agreement import agree, gather
from minillm.config import ModelConfig
from minillm.errors import CorruptError, UsageError
from minillm.model import GPT
from minillm.ops import select
from minillm.ranks import Ranks
from minillm.runs import checkpoints_of, load_run_tokenizer, read_config, require_run
from minillm.saving import ALONE, prune, save, tidy
from minillm.statetensors import load_into, refuse_misfit, refuse_values
from minillm.storage import file_digest, read_json
from minillm.tensorfiles import TensorFiles, files_by_kind
from minillm.tokenizer import Tokenizer

__all__ = ["Checkpoint", "find_step", "load_run", "open_checkpoint", "prune", "save", "tidy"]


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint; tensors are read when asked for, onto the CPU.

    files: kind ("model", "optimizer", "ema") -> its files, a rank each.
    Tensors of "optimizer" are called STATE.PARAMETER: "exp_avg.norm.weight".
    Every method raises CorruptError if what it reads is damaged or not there.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    files: dict[str, list[Path]]
    _opened: dict[str, TensorFiles] = field(default_factory=dict, repr=False, compare=False)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of tensors that there are."""
        return frozenset(self.files)

    def names(self, kind: str) -> list[str]:
        """The names of the tensors of one kind."""
        return sorted(self._of(kind).tensors)

    def keys(self, kind: str) -> list[str]:
        """What the files hold: NAME of a whole tensor, NAME[start:stop] of a part."""
        return self._of(kind).keys()

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a tensor, row by row: (stop - start,); no other is read."""
        files = self._of(kind)
        if name not in files.tensors:
            raise CorruptError(f"{self.folder}: lacks {name} of the {kind}")
        return files.read(name, start, stop)

    def piece(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        """Elements [start, stop) of parameter `name`, for one who keeps only these.

        kind: "model", "ema" or a state of the optimiser ("exp_avg"), of which there may be none:
        None. Of a state that is one number for the whole parameter ("step"), this: ().
        """
        if kind in ("model", "ema"):
            values = self.read(kind, name, start, stop)
            refuse_values(self.folder, name, values)
            return values
        files, key = self._of("optimizer"), f"{kind}.{name}"
        if key not in files.tensors:
            return None
        shape, parameter = files.tensors[key].shape, self._of("model").tensors.get(name)
        if shape and (parameter is None or shape != parameter.shape):
            raise CorruptError(f"{self.folder}: {key} is {list(shape)}, unlike its parameter")
        return files.read(key, start, stop) if shape else files.whole(key)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All tensors of one kind by name, in their shapes."""
        files = self._of(kind)
        return {name: files.whole(name) for name in files.tensors}

    def check_fit(self, kind: str, own: dict[str, Tensor]) -> None:
        """Raise CorruptError unless "model" or "ema" has tensors of these names and shapes."""
        refuse_misfit(self.folder, own, self._of(kind).tensors)

    def load_into(self, model: GPT) -> None:
        """Give `model` these weights, the averaged ones where there are any."""
        kind = "ema" if "ema" in self.kinds else "model"
        own = dict(model.named_parameters())
        self.check_fit(kind, own)
        for name, p in own.items():  # one at a time: together they may be as large as the model
            load_into({name: p}, {name: self._of(kind).whole(name)}, self.folder)

    def _of(self, kind: str) -> TensorFiles:
        if kind not in self.files:
            raise CorruptError(f"{self.folder}: has no {kind}-00001-of-*.safetensors")
        if kind not in self._opened:
            self._opened[kind] = TensorFiles(
                self.files[kind],
                lambda name: _shape_of(self.state, kind, name),
                numbers=kind == "optimizer",
            )
        return self._opened[kind]


def _shape_of(state: dict, kind: str, name: str) -> list[int] | None:
    """The shape that state.json states for a tensor, that of its parameter."""
    return state.get("shapes", {}).get(name.partition(".")[2] if kind == "optimizer" else name)


def open_checkpoint(run: Path, which: str = "last", ranks: Ranks = ALONE) -> Checkpoint:
    """The checkpoint "last", "best" or of a step number, every file checked against its hash.

    Every rank calls it, hashes its share of the files and learns what the others found.
    Raises UsageError if there is no such run or checkpoint, CorruptError if it is damaged; the
    same on all ranks.
    """
    step = gather(ranks, agree(ranks, lambda: find_step(run, which)))[0]
    folder = checkpoints_of(run).get(step, run / "checkpoints" / f"step-{step:08d}")
    return _verified(folder, step, ranks)


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


def _verified(folder: Path, step: int, ranks: Ranks = ALONE) -> Checkpoint:
    return agree(ranks, lambda: _checked(folder, step, ranks))


def _checked(folder: Path, step: int, ranks: Ranks) -> Checkpoint:
    """The checkpoint in `folder`, this rank's share of its files being hashed."""
    files = read_json(folder / "manifest.json")["files"]
    # Whole rounds from the largest down give each rank about as many bytes.
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    for name in by_size[ranks.rank :: ranks.size]:
        path, stated = folder / name, files[name]
        if not path.is_file() or path.stat().st_size != stated["bytes"]:
            raise CorruptError(f"{path}: missing or not {stated['bytes']} bytes long")
        if file_digest(path) != stated["sha256"]:
            raise CorruptError(f"{path}: damaged, its SHA-256 is not the manifest's")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in files:
            raise CorruptError(f"{path}: is not in the manifest")
    state = read_json(folder / "state.json")
    if state["step"] != step:
        raise CorruptError(f"{folder}: holds step {state['step']}")
    return Checkpoint(folder, step, state, files_by_kind(folder, files))


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
