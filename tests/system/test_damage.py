"""Damaged files of every kind: none is read as if nothing had happened, none crashes a reader.

benchmarks/reliability/damage.py makes the damages and judges what comes of them.
"""

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest

from minillm.checkpoint import read as reading
from minillm.data import batches as data, shards
from minillm.runtime import files as storage
from tests.support.broad import broad

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "reliability" / "damage.py"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="the source tree is not here")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("damage", FILE)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setitem(sys.modules, "damage", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def victims(bench, tmp_path_factory):
    return bench.make(tmp_path_factory.mktemp("victims"))


def outcomes(bench, victims, count: int) -> Counter:
    return Counter(trial for victim in victims for trial in bench.trials(victim, count, seed=count))


@broad("count", [20, 200], quick=0)
def test_every_damage_is_refused_and_the_file_named(bench, victims, count):
    counts = outcomes(bench, victims, count)
    assert {outcome for _, _, outcome in counts} == {"refused"}, counts
    for kind in (*bench.RUN_FILES, *bench.CORPUS_FILES):
        for damage in ("flips", "truncations"):
            assert counts[kind, damage, "refused"] == count
    assert {damage for _, damage, _ in counts} == {*bench.KINDS, "swaps"}
    assert bench.table(counts).count("\n") == 12


# What is taken away; the kinds of files whose damage then goes through.
PROTECTIONS = {
    "the digests of a checkpoint": (
        [(reading, "_check_file", lambda path, stated: None)],
        {"model", "optimizer", "averages"},
    ),
    "the digest in JSON": (
        [(storage, "json_digest", lambda content: ANY), (storage, "_text", lambda body: ANY)],
        {"configuration", "index"},
    ),
    "the bytes of JSON": ([(storage, "_text", lambda body: ANY)], {"configuration", "index"}),
    "the digests of blocks": (
        [(data, "_check", lambda shard, block, found: None)], {"shard", "shard, held out"},
    ),
    "the digest of a tokenizer": (
        [(shards, "_check_tokenizer", lambda corpus, expected: None)], {"tokenizer.json"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("patches, kinds", PROTECTIONS.values(), ids=PROTECTIONS)
def test_without_a_protection_damage_goes_through(bench, victims, monkeypatch, patches, kinds):
    """The judge has eyes: what each protection is for shows when it is away."""
    for patch in patches:
        monkeypatch.setattr(*patch)
    found = set()
    for victim in victims:
        files = {kind: name for kind, name in victim.files.items() if kind in kinds}
        few = replace(victim, files=files)
        found |= {kind for kind, _, outcome in bench.trials(few, 20) if outcome != "refused"}
    assert found == kinds
