"""A file of tensors is recognised by its framing, whatever the length of its header.

The first bytes of such a file are the length of its header, and some lengths look like the first
bytes of a pickle or of an archive.
"""

import json
import math
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils import _device

from minillm.checkpoint import sharded_safetensors as tensorfiles
from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.sharded_safetensors import TensorFiles, file_bytes
from minillm.checkpoint.write import save, sharded_tensors
from minillm.config.resolve import resolve
from minillm.config.train import PRESETS
from minillm.data.tokenizer import load_tokenizer
from minillm.distributed.layout import cut
from minillm.distributed.pieces import Piece
from minillm.distributed.ranks import Ranks
from minillm.errors import CorruptError, UsageError
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from minillm.optim.build import state_kinds
from minillm.runtime.pickles import HEAD, is_pickle, is_safetensors, refuse_pickle
from tests.support.thread_ranks import together

MEGABYTE = 1 << 20


def test_every_header_length_is_read(tmp_path):
    """All multiples of 8 up to 4,096: the padding of a name makes each of them."""
    path, seen = tmp_path / "x.safetensors", set()
    value = torch.arange(3.0)
    for padding in range(0, 4096, 8):
        name = "x" * (padding + 1)
        data = b"".join(file_bytes({name: value}))
        seen.add(int.from_bytes(data[:8], "little"))
        path.write_bytes(data)
        assert torch.equal(TensorFiles([path]).whole(name), value)
        assert not is_pickle(path)
    least = min(seen)
    assert least <= 104 and seen >= set(range(least, 4097, 8))
    # Shorter headers: no file of ours has them, but others write them, with one tensor or none.
    for length in range(8, least, 8):
        header = b"{}".ljust(length)
        path.write_bytes(length.to_bytes(8, "little") + header)
        assert TensorFiles([path]).tensors == {}


def test_a_checkpoint_of_several_ranks_is_read_whatever_its_header(tmp_path):
    """16 tensors make a header of 1,152 bytes: 80 04, as a pickle of protocol 4 begins."""
    (tmp_path / "config.json").touch()
    tensors = {"model": {f"blocks.{i}.weight": torch.full((2,), float(i)) for i in range(16)}}
    assert next(iter(file_bytes(tensors["model"])))[:2] == b"\x80\x04"
    state = {"shapes": {name: [2] for name in tensors["model"]}}
    together(2, lambda ranks: save(tmp_path, 1, tensors if ranks.rank else {
        "model": {"norm.weight": torch.ones(2)}}, state, ranks))  # fmt: skip
    found = open_checkpoint(tmp_path)
    assert torch.equal(found.tensors("model")["blocks.7.weight"], torch.full((2,), 7.0))


@pytest.fixture(autouse=True)
def poisoned_empty() -> None:
    """In place of that of conftest.py, which a model without memory cannot be made with."""
    # It remembers the functions that make tensors, and may have met those of conftest.py.
    _device._device_constructors.cache_clear()


@cache
def shapes_of(preset: str) -> tuple[dict[str, tuple[int, ...]], dict[str, frozenset[str]]]:
    """The parameters' shapes and the optimiser's states of a preset, without memory for them."""
    settings = resolve({}, None, preset)
    shape = replace(settings.model, vocab_size=settings.model.vocab_size or 8192)
    with torch.device("meta"):
        model = GPT(shape, EAGER)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return shapes, state_kinds(settings.train.optimizer, shapes, model.matrices())


@cache
def nothing(*shape: int) -> Tensor:
    """A tensor of this shape that has no memory."""
    return torch.empty(shape, device="meta")


def pieces_of(preset: str, zero: int, rank: int, size: int) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of each parameter, or part of one, that a rank saves."""
    shapes, _ = shapes_of(preset)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if zero == 0:
        mine = Ranks.own_share(SimpleNamespace(rank=rank, size=size), shapes)
        yield from ((name, 0, sizes[name]) for name in mine)
    elif zero == 3:  # as torch.chunk cuts rows
        for name, shape in shapes.items():
            rows = -(-shape[0] // size)
            start, stop = (min(n * rows, shape[0]) for n in (rank, rank + 1))
            yield name, start * sizes[name] // shape[0], stop * sizes[name] // shape[0]
    else:
        for layout in cut(dict(reversed(sizes.items())), size, 25 * MEGABYTE // 4, False):
            begin = rank * layout.chunk
            for name, offset in layout.offsets.items():
                span = (min(max(x - offset, 0), sizes[name]) for x in (begin, begin + layout.chunk))
                start, stop = span
                if start < stop:
                    yield name, start, stop


def tensors_of(preset: str, pieces: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, Tensor]]:
    """What a rank with these pieces saves, by kind, as the real code names and shapes it."""
    shapes, kinds = shapes_of(preset)
    made = (
        Piece(name, start, stop, nothing(stop - start), {
            kind: nothing() if kind == "step" else nothing(stop - start) for kind in kinds[name]
        })
        for name, start, stop in pieces
    )  # fmt: skip
    return sharded_tensors(made, shapes)


@cache
def tensors_of_one(preset: str, piece: tuple[str, int, int]) -> dict[str, dict[str, Tensor]]:
    return tensors_of(preset, [piece])


def files_of(preset: str, zero: int, rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    """The tensors that a rank saves, by kind."""
    pieces = pieces_of(preset, zero, rank, size)
    if zero:
        return tensors_of(preset, pieces)
    files: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for piece in pieces:  # whole parameters, the same for any number of ranks
        for kind, tensors in tensors_of_one(preset, piece).items():
            files[kind] |= tensors
    return files


def check_headers(preset: str, zero: int, ranks: list[int], size: int, place: Path) -> int:
    """How many of these ranks' files begin as a pickle does; each must be one of tensors."""
    alike = 0
    for rank in ranks:
        for tensors in files_of(preset, zero, rank, size).values():
            head = bytes(next(iter(file_bytes(tensors))))
            total = len(head) + sum(t.numel() * t.element_size() for t in tensors.values())
            assert is_safetensors(head[:HEAD], total), (preset, zero, rank, size)
            assert len(head) - 8 <= tensorfiles.MAX_HEADER
            if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
                alike += 1
                with place.open("wb") as file:  # sparse: it takes no memory on the disk
                    file.write(head)
                    file.truncate(total)
                found = dict(tensorfiles.read_header(place))
                assert sum((p.stop - p.start) * p.dtype.itemsize for p in found.values()) == (
                    total - len(head)
                )
    return alike


@pytest.mark.parametrize("preset", PRESETS)
def test_some_numbers_of_ranks_can_read_what_they_write(preset, tmp_path):
    for size in (1, 2, 3, 6, 8, 12, 16, 48):
        check_headers(preset, 0, range(0, size, -(-size // 16)), size, tmp_path / "x")
    for zero in (1, 3):
        check_headers(preset, zero, [0, 3], 4, tmp_path / "x")


@pytest.mark.slow
def test_every_number_of_ranks_can_read_what_it_writes(tmp_path):
    """All presets, from 1 rank to 256 of them, from names and shapes alone."""
    alike = 0
    for preset in PRESETS:
        for size in range(1, 257):
            alike += check_headers(preset, 0, range(size), size, tmp_path / "x")
        for zero in (1, 3):
            for size in (1, 2, 5, 8, 64, 256):
                ranks = sorted({0, 1, size // 2, size - 1} & set(range(size)))
                alike += check_headers(preset, zero, ranks, size, tmp_path / "x")
    assert alike > 50  # so many were refused when the first two bytes decided


def archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return path


def test_a_zip_archive_is_a_pickle_only_if_it_holds_one(tmp_path):
    word = archive(tmp_path / "a.docx", "[Content_Types].xml", "word/document.xml")
    book = archive(tmp_path / "a.epub", "mimetype", "META-INF/container.xml")
    for path in (word, book):
        assert not is_pickle(path)
        with pytest.raises(UsageError, match="a zip archive, not text; unpack it first"):
            refuse_pickle(path, "text")
    for name in ("data.pkl", "model/data.pkl", "archive/constants.pkl"):
        saved = archive(tmp_path / "model", "archive/version", name)
        assert is_pickle(saved)
        with pytest.raises(UsageError, match="pickled files are never read; expected text"):
            refuse_pickle(saved, "text")
    whole = archive(tmp_path / "model", "archive/data.pkl").read_bytes()
    for cut_off in (whole[:60], whole[:-1], whole + b"."):  # damaged, or in another wrapping
        saved.write_bytes(cut_off)
        assert is_pickle(saved)
    word.write_bytes(word.read_bytes()[:-10])
    assert not is_pickle(word)
    with pytest.raises(CorruptError, match="damaged"):
        TensorFiles([word])


def test_a_sentencepiece_model_that_begins_like_json_is_no_json(tmp_path):
    """Its first piece is 123 bytes long, which is a brace."""
    piece = b"\n" + bytes([114]) + b"x" * 114 + b"\x15" + b"\0" * 4 + b"\x18\x02"
    data = b"\n" + bytes([len(piece)]) + piece
    assert data.startswith(b"\n{")
    (tmp_path / "a.model").write_bytes(data)
    with pytest.raises(CorruptError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "a.model")
    (tmp_path / "b").write_text(" \n" + json.dumps({"version": 1, "kind": "byte"}))
    assert load_tokenizer(tmp_path / "b").kind == "byte"
