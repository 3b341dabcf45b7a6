"""Read any elements of tensors whose parts lie in several safetensors files, and write such files.

A safetensors file has 8 bytes of length, a JSON header of that length, and the data. A part of a
tensor is stored 1-D under the key `NAME[start:stop]`: the elements from start to stop of the
flattened tensor. A whole tensor is stored under its name, in its shape.

Source: https://github.com/huggingface/safetensors, "Format".
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

MAX_HEADER = 10_000_000  # bytes; the format allows 100,000,000
MAX_TENSORS = 100_000  # in one file
MAX_DIMS = 8
FILE = re.compile(r"([a-z_]+)-\d{5}-of-\d{5}\.safetensors")  # the form of file_name
KEY = re.compile(r"(.*)\[(0|[1-9]\d*):(0|[1-9]\d*)\]", re.DOTALL)
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of a flattened tensor in a file.

    offset: the byte of the file at which they begin
    shape: shape of the tensor if the file holds all of it; None for a part
    """

    path: Path
    offset: int
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Stored:
    """A tensor in the files: its shape, its dtype, and its parts in the order of their starts."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]


def key_of(name: str, start: int, stop: int) -> str:
    """Return the key of elements [start, stop) of a tensor.

    name: name of the tensor
    start, stop: first element of the flattened tensor, and the one after the last
    """
    return f"{name}[{start}:{stop}]"


def range_of(key: str) -> tuple[str, int, int] | None:
    """Return the (name, start, stop) of a key made by key_of; None for a whole tensor's name."""
    match = KEY.fullmatch(key)
    return (match[1], int(match[2]), int(match[3])) if match else None


def file_name(kind: str, rank: int, size: int) -> str:
    """Return the name of the file in which a rank saves its tensors of one kind.

    kind: "model", "optimizer" or "ema"
    rank, size: the rank, from 0, and the number of ranks
    """
    return f"{kind}-{rank + 1:05d}-of-{size:05d}.safetensors"


def files_by_kind(folder: Path, names: Iterable[str]) -> dict[str, list[Path]]:
    """Return the safetensors files among `names` by kind, in the order of ranks.

    folder: folder of the checkpoint
    names: names of its files, of any type

    Raises CorruptError if the file of a rank is missing, or if a name is not one of file_name.
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
    """Yield the bytes of a file of these tensors, which are copied to the CPU one at a time."""
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
    """The tensors in several files. Only the headers of the files are read at first.

    paths: the files
    shape_of: name -> the shape that the tensor must have, or None if it is not known. A tensor in
        parts needs one.
    numbers: whether a tensor of shape () is allowed in place of the shape

    Parts may overlap: the files of all ranks have the count of steps. Raises CorruptError if a file
    is not safetensors, or if parts leave a gap, reach beyond the shape or differ in dtype.
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
            name: _assemble(name, parts, shape_of(name), numbers) for name, parts in found.items()
        }

    def keys(self) -> list[str]:
        """Return the keys in all files, each once: names of whole tensors, key_of of parts."""
        found = ((name, part) for name, stored in self.tensors.items() for part in stored.parts)
        return sorted({key_of(n, p.start, p.stop) if p.shape is None else n for n, p in found})

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a flattened tensor: (stop - start,), in its dtype.

        name: name of the tensor
        start, stop: first element, and the one after the last; None: to the end

        Raises KeyError for a name that is not there, CorruptError if it has fewer elements.
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
        """Return a tensor in its shape. Raise KeyError or CorruptError as `read` does."""
        return self.read(name).view(self.tensors[name].shape)


def _assemble(name: str, parts: list[Part], stated: Any, numbers: bool) -> Stored:
    """Return the tensor that has these parts, and the shape `stated` if that is not None."""
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
    """Return (name, part) of each tensor in a file. Raise CorruptError if it is not safetensors."""
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
            raise CorruptError(f"{path}: damaged, or of an unknown dtype: {key!r} is {entry}")
        name, start, stop = span or (key, 0, math.prod(shape))
        whole = None if span else tuple(shape)
        found.append((name, Part(path, data + begin, start, stop, dtype, whole)))
        areas.append((begin, end))
    # The format demands that each byte of the data belongs to exactly one tensor.
    at = 0
    for begin, end in sorted(areas):
        if begin != at:
            raise CorruptError(f"{path}: damaged, its tensors overlap or leave a gap at byte {at}")
        at = end
    if at != size:
        raise CorruptError(f"{path}: damaged, has {size} bytes of data, not {at}")
    return found


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header without metadata, the byte at which the data begin, and their length."""
    try:
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size - 8
            head = file.read(HEAD)
            length = int.from_bytes(head[:8], "little")
            if not is_safetensors(head, size + 8) and is_pickle(path):
                raise CorruptError(f"{path}: is a pickle or an archive of one, which is never read")
            if not 0 < length <= min(size, MAX_HEADER):
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
        raise CorruptError(f"{path}: damaged, its header is not an object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CorruptError(f"{path}: holds {len(header)} tensors; at most {MAX_TENSORS}")
    return header, 8 + length, size - length


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name twice")
    return table


def _is_shape(value: Any) -> bool:
    """Return whether a value is a list of whole numbers that can be the shape of a tensor."""
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        return False
    counts = all(type(n) is int and n >= 0 for n in value)
    return counts and math.prod(max(1, n) for n in value) < 2**63


def _read_into(view: memoryview, path: Path, offset: int) -> None:
    """Fill `view` from a file, which is not mapped: a mapped file that is cut kills the process."""
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
