"""Any elements of tensors that lie in parts in several files, and every file that is none."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings as limits, strategies as some
from safetensors.torch import load_file, save_file

from minillm.checkpoint import sharded_safetensors as tensorfiles
from minillm.checkpoint.sharded_safetensors import (
    TensorFiles,
    file_name,
    files_by_kind,
    key_of,
    range_of,
)
from minillm.errors import CorruptError

DTYPES = list(tensorfiles.DTYPES.values())


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As many different bit patterns as there are elements."""
    size = torch.Size(shape).numel()
    if dtype == torch.bool:
        return (torch.arange(size) % 3 == 0).view(shape)
    return torch.arange(size).mul(7).remainder(127).to(dtype).view(shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


@limits(max_examples=120)
@given(data=some.data())
def test_any_range_of_a_tensor_cut_anyhow(folder, data):
    """Parts of any sizes, empty and overlapping ones too, in any files, beside other tensors."""
    shape = tuple(data.draw(some.lists(some.integers(0, 7), max_size=3), label="shape"))
    size = torch.Size(shape).numel()
    x = numbers(shape, data.draw(some.sampled_from(DTYPES), label="dtype"))
    borders = some.lists(some.integers(0, size), max_size=4)
    cuts = [0, *sorted(data.draw(borders, label="cuts")), size]
    more = data.draw(some.lists(some.tuples(some.integers(0, size), some.integers(0, size))))
    spans = list(zip(cuts, cuts[1:], strict=False)) + [(a, b) for a, b in more if a <= b]
    spans = data.draw(some.permutations(spans), label="spans")
    count = data.draw(some.integers(1, 4), label="files")
    paths = [folder / f"{n}.safetensors" for n in range(count)]
    for n, path in enumerate(paths):
        held = {key_of("x", a, b): x.view(-1)[a:b].clone() for a, b in spans[n::count]}
        save_file({**held, "y": torch.tensor(float(n))}, path)

    files = TensorFiles(paths, {"x": list(shape), "y": []}.get)
    start = data.draw(some.integers(0, size), label="start")
    stop = data.draw(some.integers(start, size), label="stop")
    part, whole = files.read("x", start, stop), files.whole("x")
    assert part.dtype == whole.dtype == x.dtype and whole.shape == x.shape
    assert torch.equal(part, x.view(-1)[start:stop]) and torch.equal(whole, x)
    assert torch.equal(files.read("x"), x.view(-1)) and files.whole("y").shape == ()


def test_whole_tensors_are_what_safetensors_reads(folder):
    tensors = {str(t): numbers((3, 5), t) for t in DTYPES}
    tensors |= {"none": torch.ones(0, 4), "one": torch.tensor(2.5), "a[1:b]": torch.ones(2)}
    save_file(tensors, folder / "whole.safetensors", {"format": "pt"})
    files = TensorFiles([folder / "whole.safetensors"])
    assert files.keys() == sorted(tensors) == sorted(files.tensors)
    for name, expected in load_file(folder / "whole.safetensors").items():
        found = files.whole(name)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what is read")
def test_no_more_is_read_than_was_asked_for(folder):
    """16 MiB in two files: what is read is the headers and the elements asked for."""
    half = 2**21
    x = torch.arange(2 * half).to(torch.float32)
    for n in range(2):
        span = n * half, (n + 1) * half
        save_file({key_of("x", *span): x[slice(*span)]}, folder / f"half{n}")

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # rchar

    counting = -read_so_far() + read_so_far()
    before = read_so_far()
    files = TensorFiles([folder / "half0", folder / "half1"], {"x": [2, half]}.get)
    part = files.read("x", half - 1000, half + 500)
    count = read_so_far() - before - counting
    assert torch.equal(part, x[half - 1000 : half + 500])
    assert 1500 * 4 <= count < 1500 * 4 + 1000
    before = read_so_far()
    assert torch.equal(files.whole("x").view(-1), x)
    assert read_so_far() - before - counting >= 8 * half  # a reader of all of it would show


def test_names_of_parts_and_of_files(tmp_path):
    assert range_of(key_of("a.b", 3, 70)) == ("a.b", 3, 70)
    for name in ("a", "a[3]", "a[3:]", "a[-1:2]", "a[03:4]", "a[1:2]b", "a[1: 2]", ""):
        assert range_of(name) is None, name
    names = [file_name(kind, r, 2) for kind in ("model", "ema") for r in (1, 0)]
    assert names[0] == "model-00002-of-00002.safetensors"
    assert files_by_kind(tmp_path, [*names, "state.json"]) == {
        kind: [tmp_path / file_name(kind, r, 2) for r in (0, 1)] for kind in ("model", "ema")
    }
    for bad in (names[:-1], names[1:], [*names, file_name("ema", 2, 3)], ["x.safetensors"]):
        with pytest.raises(CorruptError, match="was expected"):
            files_by_kind(tmp_path, bad)


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD = {
    "no header": (b"", b"", None),
    "a header of nothing": (b"", b"1234", None),
    "a length beyond the file": ({"x": entry()}, b"12345678", 10**6),
    "the largest length": ({"x": entry()}, b"12345678", 2**64 - 1),
    "a length too short": ({"x": entry()}, b"12345678", 20),
    "no JSON": (b"{]", b"", None),
    "no text": (b"\xff\xfe\xfd", b"", None),
    "no object": ([1], b"", None),
    "a bottomless object": (b"[" * 200_000, b"", None),
    "an unknown dtype": ({"x": entry("F128")}, b"12345678", None),
    "a dtype that is a list": ({"x": entry(["F32"])}, b"12345678", None),
    "no entry": ({"x": 3}, b"", None),
    "an entry without a shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, b"8" * 8, None),
    "a shape of text": ({"x": entry(shape="12")}, b"12345678", None),
    "a negative shape": ({"x": entry(shape=[-2])}, b"12345678", None),
    "a shape with a point": ({"x": entry(shape=[2.0])}, b"12345678", None),
    "a shape of truth": ({"x": entry(shape=[True], offsets=[0, 4])}, b"1234", None),
    "a shape beyond counting": ({"x": entry(shape=[0, 2**63], offsets=[0, 0])}, b"", None),
    "too few bytes for the shape": ({"x": entry(shape=[3])}, b"12345678", None),
    "three offsets": ({"x": entry(offsets=[0, 4, 8])}, b"12345678", None),
    "offsets beyond the data": ({"x": entry()}, b"1234567", None),
    "offsets that go back": ({"x": entry(shape=[0], offsets=[8, 8])}, b"", None),
    "data of nobody at the end": ({"x": entry()}, b"123456789", None),
    "data of nobody in between": ({"x": entry(), "y": entry(offsets=[9, 17])}, b"8" * 17, None),
    "data of two": ({"x": entry(), "y": entry(offsets=[4, 12])}, b"8" * 12, None),
    "a range of another size": ({"x[0:3]": entry()}, b"12345678", None),
    "a range that goes back": ({"x[2:0]": entry()}, b"12345678", None),
    "a range of two dimensions": ({"x[0:2]": entry(shape=[1, 2])}, b"12345678", None),
}


@pytest.mark.parametrize("header, data, length", BAD.values(), ids=BAD)
def test_what_is_no_file_of_tensors_is_refused(tmp_path, header, data, length):
    path = write(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(CorruptError, match=r"bad.safetensors: damaged"):
        TensorFiles([path], lambda name: [2])
    # As it should be, it is read.
    good = write(tmp_path / "good.safetensors", {"x[0:2]": entry()}, struct.pack("<2f", 1, 2))
    assert TensorFiles([good], lambda name: [2]).whole("x").tolist() == [1, 2]


def test_short_and_absent_files(tmp_path):
    for data in (b"", b"1234567"):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(CorruptError, match="x: damaged, states"):
            TensorFiles([tmp_path / "x"])
    with pytest.raises(CorruptError, match="y: No such file"):
        TensorFiles([tmp_path / "y"])
    with pytest.raises(CorruptError, match=": Is a directory"):
        TensorFiles([tmp_path])


A, B = ("x[0:4]", torch.ones(4)), ("x[4:6]", torch.ones(2))
MISFITS = [
    ([A], [2, 3], "no file has element 4 of x"),
    ([B], [2, 3], "no file has element 0 of x"),
    ([A, ("x[5:6]", torch.ones(1))], [6], "no file has element 4 of x"),
    ([A, ("x[5:6]", torch.ones(1))], [4], "has element 5 of x"),
    ([A, B], [5], "has element 5 of x"),
    ([A, B], [7], "no file has element 6 of x"),
    ([A, B], None, "a part of x, whose shape is not known"),
    ([A, B], [2, -3], "is stated as the shape"),
    ([A, B], "6", "is stated as the shape"),
    ([A, B], [6.0], "is stated as the shape"),
    ([A, ("x[4:6]", torch.ones(2).double())], [6], "is torch.float64, elsewhere torch.float32"),
    ([A, ("x", torch.ones(6))], [2, 3], r"x is \[6\], expected \[2, 3\]"),
    ([("x", torch.ones(6)), ("x", torch.ones(2, 3))], None, r"x is \[2, 3\], expected \[6\]"),
    ([("x", torch.tensor(1.0))], [1], r"x is \[\], expected \[1\]"),
]


@pytest.mark.parametrize("held, shape, message", MISFITS)
def test_parts_that_make_no_tensor_are_refused(tmp_path, held, shape, message):
    for n, (key, t) in enumerate(held):
        save_file({key: t}, tmp_path / str(n))
    with pytest.raises(CorruptError, match=message):
        TensorFiles([tmp_path / str(n) for n in range(len(held))], lambda name: shape)


def test_numbers_that_every_rank_has(tmp_path):
    for n in range(2):
        save_file({"step.x": torch.tensor(3.0)}, tmp_path / str(n))
    paths = [tmp_path / "0", tmp_path / "1"]
    assert TensorFiles(paths, lambda name: [4, 4], numbers=True).whole("step.x") == 3
    with pytest.raises(CorruptError, match="expected"):
        TensorFiles(paths, lambda name: [4, 4])


def test_elements_that_there_are_none_of(folder):
    save_file({"x": torch.ones(2, 3)}, folder / "six")
    files = TensorFiles([folder / "six"])
    for start, stop in ((0, 7), (-1, 3), (4, 3), (7, 7)):
        with pytest.raises(CorruptError, match="x has 6 elements"):
            files.read("x", start, stop)
    with pytest.raises(KeyError):
        files.read("y")


def test_a_file_cut_off_later_is_noticed(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / "x")
    files = TensorFiles([tmp_path / "x"])
    os.truncate(tmp_path / "x", 200)
    with pytest.raises(CorruptError, match="ends before its tensors do"):
        files.read("x")
    (tmp_path / "x").unlink()
    with pytest.raises(CorruptError, match="No such file"):
        files.read("x")


@limits(max_examples=150)
@given(data=some.data())
def test_no_header_however_damaged_is_more_than_refused(folder, data):
    save_file({key_of("x", 0, 3): torch.ones(3), "y": torch.ones(2, 2)}, folder / "fuzzed")
    raw = bytearray((folder / "fuzzed").read_bytes())
    for _ in range(data.draw(some.integers(1, 3))):
        raw[data.draw(some.integers(0, len(raw) - 29))] = data.draw(some.integers(0, 255))
    (folder / "fuzzed").write_bytes(raw)
    try:
        files = TensorFiles([folder / "fuzzed"], {"x": [3], "y": [2, 2]}.get)
        for name in files.tensors:
            files.whole(name)
    except CorruptError as error:
        assert str(folder / "fuzzed") in str(error)
