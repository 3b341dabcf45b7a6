"""Tensors that lie in parts in several files: any elements of them, no other byte being read.

The files are safetensors: 8 bytes of length, a JSON header of that length, the data. A tensor that
a file holds in part stands there in one dimension, under `NAME[start:stop]`: its elements from
start to stop, row by row. One that it holds whole stands under its own name, with its shape.

What this room does not do: know what the tensors are for (checkpoint.py, saving.py).
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.errors import CorruptError
from minillm.runtime.pickles import HEAD, is_pickle, is_safetensors

MAX_HEADER = 10_000_000  # bytes; the format itself allows ten times as much
MAX_TENSORS = 100_000  # in one file
MAX_DIMS = 8
FILE = re.compile(r"([a-z_]+)-\d{5}-of-\d{5}\.safetensors")  # as file_name makes it
KEY = re.compile(r"(.*)\[(0|[1-9]\d*):(0|[1-9]\d*)\]", re.DOTALL)
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of a tensor: from byte `offset` of a file on.

    shape: of the tensor, where the file holds the whole of it; None for a part.
    """

    path: Path
    offset: int
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Stored:
    """A tensor as the files have it: its shape, its dtype, its parts by where they start."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]


def key_of(name: str, start: int, stop: int) -> str:
    """What elements [start, stop) of a tensor are called in a file."""
    return f"{name}[{start}:{stop}]"


def range_of(key: str) -> tuple[str, int, int] | None:
    """(name, start, stop) that key_of made `key` of; None for the name of a whole tensor."""
    match = KEY.fullmatch(key)
    return (match[1], int(match[2]), int(match[3])) if match else None


def file_name(kind: str, rank: int, size: int) -> str:
    """The file in which rank `rank` of `size` keeps its tensors of one kind."""
    return f"{kind}-{rank + 1:05d}-of-{size:05d}.safetensors"


def files_by_kind(folder: Path, names: Iterable[str]) -> dict[str, list[Path]]:
    """The files among `names` that file_name named, by kind, in the order of ranks.

    Raises CorruptError if that of a rank is missing, or a name is none of these.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".safetensors"):
            found.setdefault(name.split("-")[0], []).append(name)
    for kind, named in found.items():
        for rank, name in enumerate(named):
            if name != (expected := file_name(kind, rank, len(named))):
                raise CorruptError(f"{folder}: holds {name} where {expected} was expected")
    return {kind: [folder / name for name in named] for kind, named in found.items()}


def file_bytes(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a file of these tensors, in pieces; each tensor is fetched when it is due."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Wide elements first: each tensor then begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for key in order:
        t, begin = tensors[key], at
        at += t.numel() * t.element_size()
        header[key] = {
            "dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [begin, at]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key in order:
        values = tensors[key].detach().cpu().contiguous()
        yield memoryview(values.view(-1).view(torch.uint8).numpy())


class TensorFiles:
    """The tensors of some files taken together.

    shape_of: name -> the shape that the tensor is known to have, or None. A tensor in parts needs
    one; a whole one must have it, unless it is a single number where `numbers` are allowed for.
    Parts may overlap (each rank keeps a count of steps). Only headers are read to begin with.
    Raises CorruptError on a file that is not safetensors, and on parts that leave a gap, reach
    beyond the shape or differ in dtype.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        shape_of: Callable[[str], Any] = lambda name: None,
        numbers: bool = False,
    ) -> None:
        found: dict[str, list[Part]] = {}
        for path in paths:
            for name, part in read_header(path):
                found.setdefault(name, []).append(part)
        self.tensors = {
            name: _put_together(name, parts, shape_of(name), numbers)
            for name, parts in found.items()
        }

    def keys(self) -> list[str]:
        """What the files hold: names of whole tensors, key_of those in parts; each once."""
        return sorted(
            {
                name if part.shape is not None else key_of(name, part.start, part.stop)
                for name, stored in self.tensors.items()
                for part in stored.parts
            }
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a tensor, read row by row: (stop - start,), of its dtype.

        Raises KeyError for a name that is not there, CorruptError if it has not so many elements.
        """
        stored = self.tensors[name]
        size, width = math.prod(stored.shape), stored.dtype.itemsize
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise CorruptError(
                f"{stored.parts[0].path}: {name} has {size} elements, not those from {start} to "
                f"{stop} that were asked for"
            )
        data = torch.empty((stop - start) * width, dtype=torch.uint8)
        view, at = memoryview(data.numpy()), start
        # They lie without a gap: a part that starts beyond `at` follows one that ends there.
        for part in stored.parts:
            if part.start <= at < min(part.stop, stop):
                upto = min(part.stop, stop)
                offset = part.offset + (at - part.start) * width
                _read_into(view[(at - start) * width : (upto - start) * width], part.path, offset)
                at = upto
        return data.view(stored.dtype)

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape. Raises as read."""
        return self.read(name).view(self.tensors[name].shape)


def _put_together(name: str, parts: list[Part], stated: Any, numbers: bool) -> Stored:
    """The tensor that has these parts and, where `stated` is not None, that shape."""
    first = parts[0]
    whole = next((part.shape for part in parts if part.shape is not None), None)
    if stated is None or numbers and whole == ():
        if whole is None:
            raise CorruptError(f"{first.path}: holds a part of {name}, whose shape is not known")
        shape = whole
    elif _is_shape(stated):
        shape = tuple(stated)
    else:
        raise CorruptError(f"{first.path}: {stated!r} is stated as the shape of {name}")
    for part in parts:
        if part.shape is not None and part.shape != shape:
            raise CorruptError(f"{part.path}: {name} is {list(part.shape)}, expected {list(shape)}")
        if part.dtype != first.dtype:
            raise CorruptError(f"{part.path}: {name} is {part.dtype}, elsewhere {first.dtype}")
    parts, size, at = sorted(parts, key=lambda p: (p.start, p.stop)), math.prod(shape), 0
    for part in parts:
        if part.start <= at:
            at = max(at, part.stop)
    if at < size:
        raise CorruptError(f"{first.path}: no file has element {at} of {name}, {list(shape)}")
    if (end := max(part.stop for part in parts)) > size:
        raise CorruptError(f"{first.path}: has element {end - 1} of {name}, {list(shape)}")
    return Stored(shape, first.dtype, tuple(parts))


def read_header(path: Path) -> list[tuple[str, Part]]:
    """(name, part) of each tensor in a file. Raises CorruptError if it is not safetensors."""
    header, data, size = _header(path)
    found, areas = [], []
    for key, entry in header.items():
        try:
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, end = entry["data_offsets"]
            good = _is_shape(shape) and _is_shape([begin]) and _is_shape([end])
            good = good and end - begin == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            good = False
        span = range_of(key)
        if good and span is not None:
            good = span[1] <= span[2] and shape == [span[2] - span[1]]
        if not good:
            raise CorruptError(f"{path}: damaged, or of a dtype not known here: {key!r} is {entry}")
        name, start, stop = span or (key, 0, math.prod(shape))
        whole = None if span else tuple(shape)
        found.append((name, Part(path, data + begin, start, stop, dtype, whole)))
        areas.append((begin, end))
    # As the format demands: no byte of the data belongs to nobody, none to two.
    at = 0
    for begin, end in sorted(areas):
        if begin != at:
            raise CorruptError(f"{path}: damaged, its tensors overlap or leave a gap at byte {at}")
        at = end
    if at != size:
        raise CorruptError(f"{path}: damaged, has {size} bytes of data, not {at}")
    return found


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(the header, without its metadata; the byte at which the data begin; how many there are)."""
    try:
        with path.open("rb", buffering=0) as file:
            room = path.stat().st_size - 8
            head = file.read(HEAD)
            length = int.from_bytes(head[:8], "little")
            if not is_safetensors(head, room + 8) and is_pickle(path):
                raise CorruptError(f"{path}: is a pickle or an archive of one, which is never read")
            if not 0 < length <= min(room, MAX_HEADER):
                raise CorruptError(
                    f"{path}: damaged, states {length} bytes of header; at most {MAX_HEADER}"
                )
            file.seek(8)
            header = json.loads(file.read(length), object_pairs_hook=_refuse_repeats)
    except (ValueError, RecursionError):
        raise CorruptError(f"{path}: damaged, its header is not JSON, or repeats a name") from None
    except OSError as error:
        raise CorruptError(f"{path}: {error.strerror or error}") from None
    if not isinstance(header, dict):
        raise CorruptError(f"{path}: damaged, its header is no object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CorruptError(f"{path}: holds {len(header)} tensors; at most {MAX_TENSORS}")
    return header, 8 + length, room - length


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name twice")
    return table


def _is_shape(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on, of a tensor that torch can count."""
    counts = (
        isinstance(value, list)
        and len(value) <= MAX_DIMS
        and all(type(n) is int and n >= 0 for n in value)
    )
    return counts and math.prod(max(1, n) for n in value) < 2**63


def _read_into(view: memoryview, path: Path, offset: int) -> None:
    """Fill `view` from a file. Read, not mapped: a mapped file cut off takes the process along."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while view:
                count = file.readinto(view)  # at most 2 GiB at a time
                if not count:
                    raise CorruptError(f"{path}: ends before its tensors do")
                view = view[count:]
    except OSError as error:
        raise CorruptError(f"{path}: {error.strerror or error}") from None
