"""Files that are whole or absent, and that show when they are damaged."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import storage
from minillm.errors import CorruptError
from minillm.storage import file_digest, read_json, write_durably, write_json

CONTENT = {"name": "caf\u00e9 \ud83d", "steps": [1, 2.5, None, True], "inner": {"b": 1, "a": "x"}}


def test_what_is_written_is_read(tmp_path):
    write_json(tmp_path / "a.json", CONTENT)
    assert read_json(tmp_path / "a.json") == {"version": storage.VERSION, **CONTENT}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@given(st.data())
def test_every_changed_byte_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, CONTENT)
    good = read_json(path)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        # White space between values may change; nothing that is read may.
        assert read_json(path) == good
        assert chr(raw[at]).isspace()
    except CorruptError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "damaged, not the JSON that minillm writes"),
        (b"\x00\xff\x00", "damaged, not the JSON"),
        (b"[1, 2]", "damaged, not the JSON"),
        (b'{"a": 1}', "damaged, not the JSON"),
        (b"[" * 100_000, "damaged, not the JSON"),
        (b'{"version": 2, "sha256": "0"}', "does not match its own sha256"),
        (b'{"version": 1, "sha256": "0"}', "does not match its own sha256"),
        (b'{"version": 1, "sha256": null}', "does not match its own sha256"),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path, raw, message):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match=message) as refusal:
        read_json(path, "do this")
    assert str(path) in str(refusal.value) and str(refusal.value).endswith("; do this")


def test_a_missing_file_and_nan(tmp_path):
    with pytest.raises(CorruptError, match="is missing"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_durably(path, b"old")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"


def test_digests(tmp_path):
    path = tmp_path / "a"
    write_durably(path, b"abc")
    # FIPS 180-4, the example of one block.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(path) == expected == storage.bytes_digest(b"abc")
    first, second = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert storage.json_digest(first) == storage.json_digest(second)
    assert storage.json_digest(first) == storage.bytes_digest(b'{"a":1,"b":2}')
    write_json(path, first)
    assert json.loads(path.read_bytes())["sha256"] == storage.json_digest({"version": 1, **first})
