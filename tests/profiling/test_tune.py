"""`--tune`: real kernels, interpreted, with real errors; only their times are made up."""

import json
import math
import types

import pytest
import torch

from minillm.profiling.catalogue.entry import BACKWARD, BOTH, FORWARD
from minillm.profiling.catalogue.problem import Problem
from minillm.profiling.timing import tune
from minillm.runtime import stopwatch
from tests.support.broad import broad

CPU = torch.device("cpu")
TILE = {"BLOCK_N": 4, "BLOCK_F": 256, "num_warps": 4}
WIDER = {**TILE, "BLOCK_N": 8}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Return a GPU for the tuner, on which a run takes `time` of the tile last launched.

    tables: swiglu's.    spoil: of a tile, what its results are multiplied by.
    """
    pytest.importorskip("triton")
    from minillm.kernels import _launch, swiglu as room

    if not _launch.interpreted():
        pytest.skip("made-up times are for a machine without a GPU")
    entry = {"256": dict(TILE), "512": dict(TILE)}
    tables = {"fwd": {"sm_90": entry, "sm_80": {"256": dict(TILE)}}, "bwd": {"sm_90": {}}}
    tables["bwd"]["sm_90"] = {"512": dict(TILE)}
    made = types.SimpleNamespace(
        tables=tables, entry=entry, folder=tmp_path, said=[], spoil=lambda tile: 1.0, last={},
        time=lambda tile: 100.0 / tile["BLOCK_N"] + tile["num_warps"],
    )  # fmt: skip
    launch = room.launch

    def launched(kernel, grid, *args, **options):
        launch(kernel, grid, *args, **options)
        if "fwd" in kernel.fn.__name__:
            made.last = {name: options[name] for name in TILE}
            args[1].mul_(made.spoil(made.last))

    def timed(trial, seconds, device):
        trial.once()
        if made.last["BLOCK_N"] > 8:
            raise RuntimeError("out of resource: shared memory")
        return stopwatch.Timing(made.time(made.last), 1.0, 5)

    def job_for(operation, kernel, size):
        job = tune.TileJob(Problem("swiglu", {"N": 5, "F": size - 208}, "fp32"), FORWARD)
        return job if kernel == "fwd" else None

    monkeypatch.setattr(_launch, "_tables", lambda operation: tables)
    monkeypatch.setattr(tune, "TILES", tmp_path)
    monkeypatch.setattr(tune, "job_for", job_for)
    monkeypatch.setattr(room, "launch", launched)
    monkeypatch.setattr(tune, "on_gpu", timed)
    return made


def tuned(gpu, quick=True, save=lambda rows: None) -> list[dict]:
    """Return the rows of the entry 256."""
    rows = tune.run(["swiglu"], CPU, quick, gpu.said.append, save)
    return [row for row in rows if row["size"] == 256]


def test_the_fastest_tile_is_kept_and_losers_are_told(gpu):
    rows = tuned(gpu, quick=False)
    (kept,) = [row for row in rows if row["kept"]]
    assert kept["options"] == "BLOCK_N=8 BLOCK_F=256 num_warps=2"
    assert gpu.entry["256"] == {"BLOCK_N": 8, "BLOCK_F": 256, "num_warps": 2}
    assert gpu.tables["fwd"]["sm_80"]["256"] == TILE == gpu.tables["bwd"]["sm_90"]["512"]
    assert kept["median_us"] == min(r["median_us"] for r in rows if r["median_us"]) == 14.5
    assert any("shared memory" in row["note"] for row in rows)
    assert len(rows) > 8 and len({row["options"] for row in rows}) == len(rows)
    assert json.loads((gpu.folder / "swiglu.json").read_text(encoding="utf-8")) == gpu.tables
    assert "2.00 times as fast" in gpu.said[0]


@broad("factor", [math.nan, 1.01, 0.0])
def test_a_tile_with_wrong_numbers_is_out_however_fast(gpu, factor):
    gpu.spoil = lambda tile: factor if tile["BLOCK_N"] == 8 else 1.0
    rows = tuned(gpu)
    wrong = [row for row in rows if row["options"].startswith("BLOCK_N=8 ")]
    assert len(wrong) == 2 and {row["note"] for row in wrong} == {"wrong numbers"}
    assert not any(row["median_us"] or row["kept"] for row in wrong)
    assert gpu.entry["256"] == {"BLOCK_N": 4, "BLOCK_F": 256, "num_warps": 2}  # the next best


@broad("us, kept", [(99.0, TILE), (98.1, TILE), (97.0, WIDER)], quick=(2,))
def test_a_tile_must_gain_two_per_cent(gpu, us, kept):
    gpu.time = lambda tile: us if tile == WIDER else 100.0 if tile == TILE else 200.0
    tuned(gpu)
    assert gpu.entry["256"] == kept


def test_a_tile_must_win_once_more(gpu):
    """The present tile is slow at first, as on a GPU whose clocks have not risen."""
    first = iter([300.0])
    gpu.time = lambda tile: next(first, 100.0) if tile == TILE else 150.0
    rows = tuned(gpu)
    assert [row["kept"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert gpu.entry["256"] == TILE and "the present one stays" in gpu.said[0]


def test_a_present_tile_of_wrong_numbers_judges_no_other(gpu):
    gpu.spoil = lambda tile: math.nan
    (row,) = tuned(gpu)
    assert row["note"] == "wrong numbers" and row["kept"] and gpu.entry["256"] == TILE
    assert "stays unjudged: wrong numbers" in gpu.said[0]


def test_errors_are_those_of_all_directions_of_the_problem():
    nan = math.nan
    both = (FORWARD, BACKWARD)
    assert tune.worst({FORWARD: 0.1, BACKWARD: 0.2, BOTH: nan}, both) == 0.2
    for errors in ({FORWARD: nan, BACKWARD: 0.1}, {FORWARD: 0.1, BACKWARD: nan}, {FORWARD: 0.1}):
        assert tune.worst(errors, both) == math.inf


@pytest.mark.slow
def test_the_bound_of_what_was_launched_is_told(gpu, monkeypatch):
    def bound_of(launched, kernel, options, arch):
        assert (launched, kernel, arch) == ([], "fwd", 90)  # an interpreter compiles nothing
        return {"bound_gbps": 10.0 * options["num_warps"]}

    monkeypatch.setattr(tune.correlation, "bound_of", bound_of)
    for row in tuned(gpu):
        assert row["bound_gbps"] == 10.0 * int(row["options"].rpartition("=")[2])
        assert row["bound_tflops"] is None


@pytest.mark.slow
def test_each_entry_is_saved_before_the_next(gpu):
    saved, spoil = [], gpu.spoil

    def stop(rows):
        saved.append({row["size"] for row in rows})
        assert json.loads((gpu.folder / "swiglu.json").read_text(encoding="utf-8")) == gpu.tables

        def interrupted(tile):
            raise KeyboardInterrupt

        gpu.spoil = interrupted

    with pytest.raises(KeyboardInterrupt):
        tuned(gpu, save=stop)
    assert saved == [{256}] and gpu.entry["256"] != TILE == gpu.entry["512"]
    gpu.spoil = spoil
    tuned(gpu, save=lambda rows: saved.append({row["size"] for row in rows}))
    assert saved[1:] == [{256}, {256, 512}]


@pytest.mark.parametrize("path", sorted(tune.TILES.glob("*.json")), ids=lambda p: p.stem)
def test_every_entry_of_every_table_has_a_job_that_reads_it(path):
    tables = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(tune.text(tables)) == tables
    for kernel, arches in tables.items():
        for size, options in arches["sm_90"].items():
            job = tune.job_for(path.stem, kernel, int(size))
            if job is None:
                assert kernel in ("combine", "uniform")
                continue
            assert job.direction in job.problem.directions
            around = tune.neighbours(options)
            assert around and options not in around
