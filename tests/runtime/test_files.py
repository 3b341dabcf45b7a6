"""Files that are whole or absent, and that show when they are damaged."""

import json
import os

import pytest
from hypothesis import given, strategies as st

from minillm.errors import CorruptError
from minillm.runtime import files as storage
from minillm.runtime.files import file_digest, read_json, write_durably, write_json

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
    with pytest.raises(CorruptError) as refusal:  # even white space between values
        read_json(path)
    assert str(path) in str(refusal.value)
    write_json(path, CONTENT)
    assert read_json(path) == good


def test_white_space_counts(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, CONTENT)
    raw = path.read_bytes()
    for other in (raw[:-1], raw + b"\n", raw.replace(b": ", b":\t"), raw.replace(b"\n", b"\r\n")):
        path.write_bytes(other)
        with pytest.raises(CorruptError, match="does not match its own sha256"):
            read_json(path)


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
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


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


def test_an_older_version_is_lifted_and_a_newer_one_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"steps": 3})
    with monkeypatch.context() as patch:
        lifts = {
            1: lambda name, content: {"n_steps": content["steps"], "from": name},
            2: lambda name, content: {**content, "more": True},
        }
        patch.setattr(storage, "VERSION", 3)
        patch.setattr(storage, "LIFTS", lifts)
        lifted = {"version": 3, "n_steps": 3, "from": "a.json", "more": True}
        assert read_json(path) == lifted
        write_json(path, {"n_steps": 4})
        assert read_json(path) == {"version": 3, "n_steps": 4}
    with pytest.raises(CorruptError, match="has format version 3, which a newer minillm wrote; .*"):
        read_json(path)
    for version in (0, None, "1", [1], True, -1):
        write_json(path, {"version": version})
        if version is not True:  # which Python takes for 1
            with pytest.raises(CorruptError, match="has format version .*, expected 1"):
                read_json(path)


def test_a_builder_that_lives_is_left_alone(tmp_path):
    """Of one that was killed nothing stays; others' files do."""
    folder, dead = tmp_path / "words", tmp_path / ".words.01234567.tmp"
    for other in (dead, tmp_path / ".words.mine.tmp", tmp_path / ".word.01234567.tmp"):
        other.mkdir()
        (other / "index.json").touch()
    with storage.building(folder) as one:
        assert not dead.exists()
        (one / "one").touch()
        with pytest.raises(OSError), storage.building(folder) as failed:
            assert one.exists()
            raise OSError(28, "No space left on device")
        assert one.exists() and not failed.exists() and not folder.exists()
    assert [p.name for p in folder.iterdir()] == ["one"]
    with pytest.raises(OSError), storage.building(folder) as two:
        (two / "two").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".word.01234567.tmp", ".words.mine.tmp", "words"
    ]  # fmt: skip
    assert [p.name for p in folder.iterdir()] == ["one"]
