"""Verify the files of one checkpoint, and read its tensors when they are needed.

Checkpoints are chosen in find.py and written in write.py.
"""

import errno
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from minillm.checkpoint.schema import check_state
from minillm.checkpoint.sharded_safetensors import FILE, Stored, TensorFiles, files_by_kind
from minillm.distributed.agreement import agree
from minillm.distributed.ranks import Ranks
from minillm.distributed.state_dict import load_into, refuse_misfit, refuse_values
from minillm.errors import CorruptError
from minillm.runtime.files import file_digest, read_json

# The errors of a file that was deleted after it was listed, of a medium that has lost data, and of
# something that is not a file.
DAMAGED = {errno.ENOENT, errno.EIO, errno.EBADMSG, errno.ENXIO, errno.EISDIR, errno.ENOTDIR,
           errno.ELOOP, getattr(errno, "EUCLEAN", errno.EIO),
           getattr(errno, "ESTALE", errno.EIO)}  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, whose tensors are read onto the CPU when they are needed.

    folder: the folder of the checkpoint
    step: its step
    state: the content of state.json
    files: the files of each verified kind ("model", "optimizer", "ema"), in the order of ranks

    Tensors of the kind "optimizer" are named STATE.PARAMETER, such as "exp_avg.norm.weight". Every
    method raises CorruptError if what it reads is damaged or missing.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    files: dict[str, list[Path]]
    _stamp: list[int] | None = field(default=None, repr=False, compare=False)
    _opened: dict[str, TensorFiles] = field(default_factory=dict, repr=False, compare=False)

    def is_there(self) -> bool:
        """Return whether the files still are those that were verified."""
        return stamp_of(self.folder) == self._stamp

    def is_replaced(self) -> bool:
        """Return whether other files have replaced those that were verified."""
        return stamp_of(self.folder) not in (None, self._stamp)

    @property
    def weights(self) -> str:
        """The kind of tensors to generate with: "ema" if there are any, else "model"."""
        return weights_among(self.files)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of tensors in the checkpoint."""
        return frozenset(self.files)

    def names(self, kind: str) -> list[str]:
        """Return the names of the tensors of one kind."""
        return sorted(self._of(kind).tensors)

    def keys(self, kind: str) -> list[str]:
        """Return the keys in the files: NAME of a whole tensor, NAME[start:stop] of a part."""
        return self._of(kind).keys()

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a flattened tensor, (stop - start,), and read no others.

        kind: "model", "optimizer" or "ema"
        name: name of the tensor
        start, stop: first element, and the one after the last; None: to the end
        """
        files = self._of(kind)
        if name not in files.tensors:
            raise CorruptError(f"{self.folder}: lacks {name} of the {kind}")
        return files.read(name, start, stop)

    def piece(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        """Return elements [start, stop) of the weights or of a state of parameter `name`.

        kind: "model", "ema" or a state of the optimiser, such as "exp_avg"
        name: name of the parameter
        start, stop: first element of the flattened parameter, and the one after the last

        A state that is one number for the whole parameter ("step") is returned as (). The result is
        None if the parameter has no such state.
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
        """Return all tensors of one kind by name, in their shapes."""
        files = self._of(kind)
        return {name: files.whole(name) for name in files.tensors}

    def check_fit(self, kind: str, own: dict[str, Tensor]) -> None:
        """Raise CorruptError unless a kind has the names and shapes of the tensors in `own`.

        kind: "model" or "ema"
        own: the tensors to load into, by name
        """
        refuse_misfit(self.folder, own, self._of(kind).tensors)

    def check_optimizer(self, kinds: dict[str, frozenset[str]]) -> None:
        """Raise CorruptError unless each parameter has exactly these states, of its shape.

        kinds: parameter -> the states that its optimiser keeps of it

        Before the first step of an optimiser no parameter has a state.
        """
        model = self._of("model").tensors
        states = self._of("optimizer").tensors if "optimizer" in self.kinds else {}
        shapes = {name: t.shape for name, t in model.items()}
        refuse_states(self.files.get("optimizer", [self.folder])[0], states, kinds, shapes)

    def n_elements(self, kind: str) -> int:
        """Return the number of elements of all tensors of one kind together."""
        return sum(math.prod(t.shape) for t in self._of(kind).tensors.values())

    def load_into(self, model: nn.Module) -> None:
        """Load these weights into `model`: the averaged ones if there are any."""
        kind, own = self.weights, dict(model.named_parameters())
        self.check_fit(kind, own)
        for name, p in own.items():  # one at a time: together they are as large as the model
            load_into({name: p}, {name: self._of(kind).whole(name)}, self.folder)

    def _of(self, kind: str) -> TensorFiles:
        if not self.files.get(kind):
            raise CorruptError(f"{self.folder}: has no {kind}-00001-of-*.safetensors")
        if kind not in self._opened:
            self._opened[kind] = TensorFiles(
                self.files[kind],
                lambda name: shape_of(self.state, kind, name),
                numbers=kind == "optimizer",
            )
        return self._opened[kind]


def shape_of(state: dict[str, Any], kind: str, name: str) -> list[int] | None:
    """Return the shape of a tensor's parameter as state.json states it, or None.

    state: content of state.json
    kind: "model", "optimizer" or "ema"
    name: name of the tensor, in "optimizer" STATE.PARAMETER
    """
    return state.get("shapes", {}).get(name.partition(".")[2] if kind == "optimizer" else name)


def weights_among(kinds: Collection[str]) -> str:
    """Return the kind of tensors to generate with."""
    return "ema" if "ema" in kinds else "model"


def stamp_of(folder: Path) -> list[int] | None:
    """Return inode, time and size of the manifest; None if there is no manifest.

    If a checkpoint is replaced, the stamp of its folder changes.
    """
    try:
        found = (folder / "manifest.json").stat()
        return [found.st_ino, found.st_mtime_ns, found.st_size]
    except OSError:
        return None


def verified(folder: Path, step: int, ranks: Ranks, weights: bool = False) -> Checkpoint:
    """Return the checkpoint in `folder`, every file checked against its hash.

    Every rank calls it and checks its share of the files.

    folder: folder of the checkpoint
    step: the step that the checkpoint must have
    ranks: ranks that verify it together
    weights: check and open only the weights to generate with; the other files may be missing

    Raises CorruptError, on all ranks, if a file is missing, damaged or from another checkpoint.
    """
    return agree(ranks, lambda: _checked(folder, step, ranks, weights))


def _checked(folder: Path, step: int, ranks: Ranks, weights: bool) -> Checkpoint:
    stamp, stated = stamp_of(folder), _manifest(folder)
    files = files_by_kind(folder, stated)
    if weights:
        kind = weights_among(files)
        files = {kind: files.get(kind, [])}
    needed = ["state.json", *(path.name for paths in files.values() for path in paths)]
    # Dealt out from the largest file down, each rank gets about the same number of bytes.
    by_size = sorted(needed, key=lambda name: (-stated[name]["bytes"], name))
    for name in by_size[ranks.rank :: ranks.size]:
        _or_corrupt(folder / name, partial(_check_file, folder / name, stated[name]))
    for path in _or_corrupt(folder, lambda: sorted(folder.glob("*.safetensors"))):
        if FILE.fullmatch(path.name) and path.name not in stated:  # other names are allowed
            raise CorruptError(f"{path}: is not in the manifest")
    state = read_state(folder)
    if state["step"] != step or state.get("progress", {}).get("step", step) != step:
        raise CorruptError(f"{folder}: holds step {state['step']}")
    return Checkpoint(folder, step, state, files, stamp)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of state.json, after its digest and its fields have been checked."""
    path = folder / "state.json"
    state = _or_corrupt(path, lambda: read_json(path))
    check_state(path, state, ["step"])
    return state


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the files that the manifest names, with their sizes and digests."""
    path = folder / "manifest.json"
    files = _or_corrupt(path, lambda: read_json(path)).get("files")
    if not isinstance(files, dict) or "state.json" not in files:
        raise CorruptError(f"{path}: names no state.json")
    for name, stated in files.items():
        # A name must not lead out of the folder, even in a manifest made by someone else.
        good = (name == "state.json" or FILE.fullmatch(name)) and isinstance(stated, dict)
        good = good and type(size := stated.get("bytes")) is int and 0 <= size < 2**63
        if not good or not isinstance(stated.get("sha256"), str):
            raise CorruptError(f"{path}: {name!r} is {stated!r}")
    return files


def _check_file(path: Path, stated: dict[str, Any]) -> None:
    if not path.is_file():
        raise CorruptError(f"{path}: is missing")
    if path.stat().st_size != stated["bytes"]:
        raise CorruptError(f"{path}: damaged, is not {stated['bytes']} bytes long")
    if file_digest(path) != stated["sha256"]:
        raise CorruptError(f"{path}: damaged, its SHA-256 is not the manifest's")


def _or_corrupt(path: Path, read: Callable[[], T]) -> T:
    """Return what read() returns. Raise CorruptError if the file is missing or unreadable."""
    try:
        return read()
    except OSError as error:
        if error.errno not in DAMAGED:
            raise
        raise CorruptError(f"{path}: cannot be read: {error.strerror}") from None


def refuse_states(
    source: Path,
    found: dict[str, Stored],
    kinds: dict[str, frozenset[str]],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Raise CorruptError unless the optimiser states are complete and have the right shapes.

    source: the file to name if a state is missing
    found: the states in the files, named KIND.PARAMETER; before the first step there are none
    kinds: parameter -> the states that it must have
    shapes: shapes of the parameters; a state has the shape of its parameter, but "step" is ()
    """
    expected = {f"{kind}.{name}" for name, own in kinds.items() for kind in own}
    missing, extra = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if extra:
        path = found[extra[0]].parts[0].path
        raise CorruptError(f"{path}: holds {extra[0]}, which the run's optimiser does not know")
    if found and missing:
        raise CorruptError(f"{source}: lacks {missing[0]}, which the run's optimiser keeps")
    for key, t in found.items():
        kind, _, name = key.partition(".")
        shape = () if kind == "step" else shapes[name]
        if t.shape != shape or not t.dtype.is_floating_point:
            raise CorruptError(
                f"{t.parts[0].path}: {key} is {t.dtype} {list(t.shape)}, expected {list(shape)}"
            )
