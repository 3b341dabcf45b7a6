"""Plans: sums against the model itself, formulas by hand, limits, and what the verb refuses."""

import json
import sys

import pytest

from minillm import __main__ as verbs
from minillm.checkpoint.run_folder import RunFolder
from minillm.config.train import PRESETS, ModelConfig
from minillm.errors import UsageError
from minillm.model.gpt import GPT
from minillm.model.size import flops_per_token, n_block_matrix_parameters, n_parameters
from minillm.ops import EAGER
from minillm.planning import estimate as plan
from minillm.planning.job import Job
from minillm.planning.network import ROUNDS, Link, alone, nodes
from minillm.runtime import ceilings, device as world

MIB = 2**20
MODEL = ModelConfig(vocab_size=1000, seq_len=64, n_layer=4, n_head=4, d_model=64)
N = n_parameters(MODEL)
SHAPES = [
    {},
    {"tie_embeddings": True, "position": "learned", "norm": "layernorm", "bias": True},
    {"n_kv_head": 2, "qk_norm": True, "qk_bias": True, "mlp": "gelu"},
    {"recurrent": "1,2,1"},
    {"recurrent": "0,2,1", "injection": "add", "mean_recurrence": 3},
    {"recurrent": "1,2,0", "recurrence_style": "parcae", "norm": "layernorm", "bias": True},
    {"recurrent": "1,1,1", "recurrence_style": "parcae", "injection": "concat"},
]
PREFIXES = {"embed": "embedding", "position": "positions", "blocks": "blocks"}


def shaped(shape: dict) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 100, "n_layer": 3, "n_head": 4, "d_model": 32, **shape})


def part_of(name: str, config: ModelConfig) -> str:
    """The part of the plan that a parameter belongs to."""
    first, rest = name.split(".", 1)
    if first != "blocks" or config.recurrent is None:
        return PREFIXES.get(first, first)
    layer, (prelude, core, _) = int(rest.split(".")[0]), config.depths
    return "prelude" if layer < prelude else "core" if layer < prelude + core else "coda"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_those_of_the_model(shape):
    config, counted = shaped(shape), {}
    for name, p in GPT(config, EAGER).named_parameters():
        part = part_of(name, config)
        counted[part] = counted.get(part, 0) + p.numel()
    found = {name: stored for name, (stored, _) in plan.parts(config).items() if stored}
    assert found == counted
    assert sum(found.values()) == n_parameters(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_parts_of_presets_add_up(preset):
    known = ModelConfig.__dataclass_fields__
    config = ModelConfig(
        **{"vocab_size": 4096} | {k: v for k, v in PRESETS[preset].items() if k in known}
    )
    assert sum(stored for stored, _ in plan.parts(config).values()) == n_parameters(config)
    assert sum(plan.units(config)) == n_parameters(config)


def test_what_a_pass_uses():
    config = shaped({"recurrent": "1,2,1", "mean_recurrence": 5, "tie_embeddings": True})
    parts = plan.parts(config)
    assert parts["core"][1] == 5 * parts["core"][0] and parts["coda"][1] == parts["coda"][0]
    assert parts["injection"] == (2 * 32 * 32, 32 * 32 + 5 * 32 * 32)
    assert parts["head"] == (0, 3200) and parts["norm"] == (32, 64)


@pytest.mark.parametrize("shape", [{}, {"recurrent": "1,2,1"}, {"recurrent": "1,2,1",
    "recurrence_style": "parcae"}], ids=str)  # fmt: skip
def test_what_muon_moves(shape):
    model = GPT(shaped(shape), EAGER)
    matrices = [dict(model.named_parameters())[name] for name in model.matrices()]
    assert plan.muon_parameters(model.config) == sum(p.numel() for p in matrices)
    parts = [(rows, p.shape[1]) for p, split in zip(matrices, model.matrices().values(),
        strict=True) for rows in split]  # fmt: skip
    products = sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in parts)
    assert plan.newton_schulz_flops(model.config) == 5 * products


def test_memory_in_bf16_by_hand():
    job = Job(MODEL, ranks=4, width=2)
    by_hand = {
        0: {"parameters": 4 * N, "gradients": 4 * N, "moments": 8 * N},
        1: {"parameters": 2 * N, "gradients": 4 * N + N, "masters": N, "moments": 2 * N},
        2: {"parameters": 2 * N, "gradients": N, "masters": N, "moments": 2 * N,
            "buffers": 2 * 4 * N},
        3: {"parameters": N, "gradients": N, "moments": 2 * N,
            "buffers": 2 * 2 * (2 * 64 * 1000 + 64)},
    }  # fmt: skip
    for stage, expected in by_hand.items():
        assert {k: v for k, v in plan.memory(job, stage).items() if v} == expected


def test_memory_otherwise():
    wide = Job(MODEL, ranks=4, average=True)  # in fp32 masters are the parameters
    assert plan.memory(wide, 1)["masters"] == 0 and plan.memory(wide, 1)["parameters"] == 4 * N
    assert [plan.memory(wide, s)["average"] for s in plan.STAGES] == [4 * N] * 4
    matrices = 4 * n_block_matrix_parameters(MODEL)
    muon = Job(MODEL, ranks=4, optimizer="muon")
    assert plan.memory(muon, 0)["moments"] == 8 * N - 4 * matrices
    assert plan.memory(muon, 2)["moments"] == 2 * N - matrices
    large = ModelConfig(vocab_size=50000, seq_len=64, n_layer=4, n_head=4, d_model=1024)
    assert plan.memory(Job(large, ranks=4), 2)["buffers"] == 2 * 25 * MIB


@pytest.mark.parametrize("width, stage, host", [(2, 1, 3 * N), (4, 1, 3 * N), (2, 2, 3 * N)])
def test_offload_moves_the_optimiser(width, stage, host):
    here = plan.memory(Job(MODEL, ranks=4, width=width), stage)
    away = plan.memory(Job(MODEL, ranks=4, width=width, offload=True), stage)
    assert away["moments"] == away["masters"] == 0 and away["host"] == host and not here["host"]
    assert away["buffers"] == here["buffers"]
    assert away["gradients"] == here["gradients"]


def volume(job: Job, stage: int, collective: str) -> float:
    return sum(t.n_bytes * t.count for t in plan.traffic(job, stage)
               if t.collective == collective and t.n_bytes > 8)  # fmt: skip


def test_traffic_by_hand():
    job = Job(MODEL, ranks=2, batch_size=8, micro_batch=1, width=2, bucket_bytes=N)
    assert job.micro_batches == 4
    assert volume(job, 0, "all_reduce") == pytest.approx(4 * N)
    for stage, times in ((1, 1), (2, 4), (3, 4)):
        assert volume(job, stage, "reduce_scatter") == pytest.approx(times * 4 * N)
    for stage, times in ((1, 1), (2, 1), (3, 8)):
        assert volume(job, stage, "all_gather") == pytest.approx(times * 2 * N)
    assert [t.count for t in plan.traffic(job, 2)[:2]] == [16, 4]  # buckets of a quarter
    assert [t.count for t in plan.traffic(job, 3)[:2]] == [2 * 4 * 5, 4 * 5]  # blocks, and the rest
    assert plan.traffic(Job(MODEL), 2) == []


def test_the_time_of_a_step_by_hand():
    job = Job(MODEL, ranks=2, batch_size=8, micro_batch=1, bucket_bytes=1 << 40)
    network = nodes(2, 8, Link(0.0, 4 * N / 2), Link(0.0, 1.0), "")  # N fp32 in a second
    small = 2 * 2 * 8 / (4 * N)
    no_overlap = plan.step_time(job, 2, network, 12.0, 0.5)
    assert no_overlap.communication_s == pytest.approx(4 + 1 + small)
    assert no_overlap.total_s == pytest.approx(12 + 4 + 1 + small + 0.5)
    # Of 4 s of reductions half run beside 8 s of backward passes, half do not; the gathering never.
    half = plan.step_time(job, 2, network, 12.0, 0.5, overlap=0.5)
    assert half.exposed_s == pytest.approx(2 + 1 + small)
    # Stage 0 has the last of four backward passes to hide in: 2 s of which hide all 2 s.
    assert plan.step_time(job, 0, network, 12.0, overlap=1.0).exposed_s == pytest.approx(small)
    assert plan.step_time(job, 0, network, 6.0, overlap=1.0).exposed_s == pytest.approx(1 + small)
    # Stage 3 hides behind everything: T = max(compute, communication).
    full = plan.step_time(job, 3, network, 3.0, overlap=1.0)
    assert full.total_s == pytest.approx(12 + small)


@pytest.mark.parametrize("stage", plan.STAGES)
def test_one_rank_sends_nothing_and_many_compute_less(stage):
    time = plan.step_time(Job(MODEL), stage, alone(), 2.0, 0.25)
    assert (time.communication_s, time.exposed_s, time.total_s) == (0, 0, 2.25)
    one, four = (plan.compute_seconds(Job(MODEL, ranks=r), 1e9) for r in (1, 4))
    assert one == pytest.approx(4 * four)
    assert one == flops_per_token(MODEL) * 64 * 64 / 1e9
    assert plan.compute_seconds(Job(MODEL, again=True), 1e9) == pytest.approx(one * 4 / 3)


def test_the_optimisers_step_by_hand():
    assert plan.optimizer_seconds(Job(MODEL, 4), 0, 1, N, 1) == 28
    assert plan.optimizer_seconds(Job(MODEL, 4), 1, 1, N, 1) == 7
    assert plan.optimizer_seconds(Job(MODEL, 4, width=2), 2, 1, N, 1) == 30 / 4
    away = plan.optimizer_seconds(Job(MODEL, 4, width=2, offload=True), 2, 1, N, 2 * N)
    assert away == 30 / 4 + 6 / 8
    muon = plan.optimizer_seconds(Job(MODEL, 4, optimizer="muon"), 1, 1e9, N, 1)
    assert muon == pytest.approx(7 + plan.newton_schulz_flops(MODEL) / 4e9)


def test_what_cannot_be_shared_out():
    with pytest.raises(UsageError, match="batch_size 64 is not divisible by 5 ranks"):
        Job(MODEL, ranks=5)
    with pytest.raises(UsageError, match="micro_batch_size 32 does not divide the 16 sequences"):
        Job(MODEL, ranks=4, micro_batch=32)


@pytest.fixture
def planned(monkeypatch, capfd, tmp_path):
    """planned(*flags) -> (exit code, output, errors), where a rank has 1 TFLOP/s."""
    monkeypatch.setattr(world, "measured_peak_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr(world, "set_threads", lambda wish: (1, "in a test"))
    monkeypatch.setattr(ceilings, "ceilings", lambda *args, **options: {"memory_gbps": 10.0})
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        words = ["minillm", "plan", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", words)
        return verbs.main(), *capfd.readouterr()

    return run


def test_the_plan_as_text(planned):
    flags = ["--preset", "nano", "--zero", 2, "--dtype", "fp32"]
    code, out, err = planned(*flags, "--gpu", "h100", "--gpus", 4)
    assert (code, err) == (0, "")
    for said in ("4,096, assumed: what bpe takes", "zero 2 *", "activations, estimated",
                 "fits: ", "of 79.1 GiB per GPU", "4 x H100 SXM 80 GB", "not measured",
                 "66.9 TFLOP/s in fp32, dense: data sheet", "1,836,672"):  # fmt: skip
        assert said in out, said
    code, out, err = planned(*flags)
    assert (code, err) == (0, "")
    assert "peak 1 TFLOP/s per rank: measured here" in out and "this machine" in out


def test_the_plan_as_json(planned, tmp_path):
    links = {name: {"alpha_s": 1e-3, "beta_bytes_per_s": 1e9} for name in ROUNDS}
    path = tmp_path / "links.json"
    path.write_text(json.dumps({"machine": "m", "worlds": {"2": {"date": "d", **links}}}))
    flags = ["--preset", "nano-recurrent", "--optimizer", "adamw", "--vocab-size", 500]
    code, out, _ = planned(*flags, "--gpus", 2, "--zero", 3, "--links", path, "--json")
    found = json.loads(out)
    assert code == 0 and not found["extrapolation"] and found["ranks"] == 2
    total = found["parameters"]["total"]
    assert sum(p["stored"] for p in found["parameters"]["parts"].values()) == total
    assert set(found["memory"]) == set(found["time"]) == set("0123")
    assert found["memory"]["3"]["moments"] == 4 * total
    assert set(found["time"]["3"]) == {"compute_s", "communication_s", "exposed_s", "optimizer_s",
                                       "total_s", "tokens_per_s", "run_s"}  # fmt: skip
    assert found["flops"]["run"] == 1000 * found["flops"]["step"]
    assert any("fitted d on m" in line for line in found["figures"])


def test_muon_has_no_stage_3(planned):
    _, out, _ = planned("--preset", "nano", "--gpu", "h100", "--gpus", 2, "--json")
    assert json.loads(out)["memory"]["3"] is None and json.loads(out)["time"]["3"] is None


def test_the_vocabulary_of_a_corpus(planned, tiny_run):
    corpus = RunFolder(tiny_run).corpus()
    _, out, err = planned("--data", corpus, "--seq-len", 16, "--epochs", 2, "--json")
    found = json.loads(out)
    assert found["parameters"]["vocabulary"].startswith("257, of ") and not err
    assert found["flops"]["steps"] > 1
    _, out, _ = planned("--resume", tiny_run, "--gpu", "t4", "--gpus", 2, "--json")
    assert json.loads(out)["parameters"]["vocabulary"].startswith("257, ")


REFUSED = [
    (["--gpus", "0"], "argument --gpus: 0 is out of range"),
    (["--zero", "4"], "argument --zero: 4 is out of range; expected between 0 and 3"),
    (["--gpu", "h100", "--gpus", "3"], "--batch-size 16 is not divisible by 3 ranks"),
    (["--gpu", "h100", "--gpus", "32"], "--batch-size 16 is not divisible by 32 ranks"),
    (
        ["--gpu", "h100", "--gpus", "4", "--micro-batch-size", "8"],
        "--micro-batch-size 8 does not divide the 4",
    ),
    (["--zero", "3"], "--zero 3 splits the matrices that muon needs"),
    (["--offload"], "--offload needs --zero 1 or --zero 2; add one"),
    (
        ["--gpu", "h100", "--gpus", "16", "--node-gpus", "3"],
        "--gpus 16 does not fill nodes of --node-gpus 3",
    ),
    (["--links", "none", "--link-gbs", "3"], "--links and --link-gbs"),
    (["--gpus", "2", "--links", "none"], "--links none: no such file"),
    (["--mfu", "0"], "argument --mfu: 0 is not above 0"),
    (["--link-gbs", "nan"], "argument --link-gbs: 'nan' is not a finite number"),
    (["--flops", "-1"], "argument --flops: -1.0 is out of range"),
    (["--stpes", "3"], "unknown flag --stpes; did you mean --steps?"),
    (["--print-config"], "--print-config is train.py's"),
]


@pytest.mark.parametrize("flags, message", REFUSED, ids=str)
def test_refusals(planned, flags, message):
    code, out, err = planned("--preset", "nano", *flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"minillm plan: error: {message}") and err.count("\n") == 1
