"""Plans for GPUs that are not here: the table of cards, verdicts, and where figures are from."""

import json
import math
import re
import sys
from functools import cache

import pytest
import torch

from minillm import __main__ as verbs
from minillm.config.train import PRESETS, ModelConfig
from minillm.errors import UsageError
from minillm.model.size import n_parameters
from minillm.planning import cards, estimate as plan, fit as plan_fit
from minillm.planning.cards import CARDS, GIB
from minillm.planning.fit import Budget, Capacity
from minillm.planning.job import Job
from minillm.runtime import ceilings, device as world, units

GPUS = (1, 8, 64)


def made_up_line(config, dtype, *, narrow=False, again=False, fused=False):
    """Bytes in proportion to the tokens and layers, as activations.activation_line counts them."""
    row = config.seq_len * config.d_model * dtype.itemsize
    return row * (2.0 if again else 16.0) * config.n_layer, row * (2.0 if again else 15.0)


@pytest.fixture
def planned(monkeypatch, capfd, tmp_path):
    """planned(*flags) -> (exit code, output, errors) on a CPU of 1 TFLOP/s; nothing is measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(world, "measured_peak_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr(world, "set_threads", lambda wish: (1, "in a test"))
    monkeypatch.setattr(world, "available_memory", lambda device: 8 * GIB)
    monkeypatch.setattr(ceilings, "ceilings", lambda *args, **options: {"memory_gbps": 10.0})
    monkeypatch.setattr(plan_fit.activations, "activation_line", made_up_line)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["minillm", "plan", *map(str, flags)])
        return verbs.main(), *capfd.readouterr()

    return run


# The table


@pytest.mark.parametrize("name, bf16, fp32, gb, gbs", [
    # Dense bf16 (fp16 on the last two) and fp32 TFLOP/s, nominal GB, GB/s, as on the data sheets;
    # those of H100 and L40S list the tensor rates with sparsity, which is twice the dense rate.
    ("h200", 1979 / 2, 67, 141, 4800), ("h100", 1979 / 2, 67, 80, 3350),
    ("a100-80", 312, 19.5, 80, 2039), ("a100-40", 312, 19.5, 40, 1555),
    ("l40s", 362.05, 91.6, 48, 864), ("rtx-5090", 209.5, 104.8, 32, 1792),
    ("rtx-4090", 165.2, 82.6, 24, 1008), ("rtx-3090", 71, 35.6, 24, 936),
    ("t4", 65, 8.1, 16, 300), ("v100", 125, 15.7, 16, 900), ("v100-32", 125, 15.7, 32, 900),
])  # fmt: skip
def test_cards_have_the_dense_rates_of_their_data_sheets(name, bf16, fp32, gb, gbs):
    card = cards.find(name)
    assert card.peak_flops("fp16") == pytest.approx(1e12 * bf16, rel=1e-3)
    assert card.peak_flops("fp32") == pytest.approx(1e12 * fp32, rel=2e-3)
    assert card.memory_gbs == pytest.approx(gbs)
    assert f"{gb} GB" in card.title
    # Nominal gigabytes are between 10^9 and 2^30 bytes; ECC and firmware take up to 8 %.
    assert 0.92 * gb * 1e9 / GIB < card.memory_gib < gb
    assert card.source and "NVLink" in card.link or "PCIe" in card.link
    if name in ("t4", "v100", "v100-32"):
        assert not card.has_bf16 and not card.runs_triton
        with pytest.raises(UsageError, match="dtype bf16: .* use dtype fp16 or fp32"):
            card.peak_flops("bf16")
    else:
        assert card.runs_triton and card.peak_flops("bf16") == card.peak_flops("fp16")


@pytest.mark.parametrize("text, name", [
    ("h100", "h100"), ("H100", "h100"), ("NVIDIA H100 SXM5 80GB", None), ("RTX 4090", "rtx-4090"),
    ("rtx4090", "rtx-4090"), ("4090", "rtx-4090"), ("A100-80GB", "a100-80"), ("a100", "a100-40"),
    ("Tesla V100", "v100"), ("h10", None), ("", None), ("--", None), ("radeon", None),
])  # fmt: skip
def test_cards_are_found_by_what_people_write(text, name):
    if name:
        assert cards.find(text).name == name
        return
    with pytest.raises(UsageError, match="is not a known card; .*known: h200, h100, a100-80"):
        cards.find(text)


@pytest.mark.parametrize("name, gib, card", [
    ("NVIDIA H100 80GB HBM3", 79.2, "h100"), ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
    ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80"), ("Tesla V100-SXM2-32GB", 31.7, "v100-32"),
    ("NVIDIA H100 PCIe", 79.2, None), ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, None),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.5, None), ("Something else", 80, None),
])  # fmt: skip
def test_a_device_here_is_known_by_name_and_memory(name, gib, card):
    found = cards.of_device(name, int(gib * GIB))
    assert (found.name if found else None) == card


# What is planned for


@pytest.mark.parametrize("flags", [
    ["--gpus", 64], ["--gpus", 2, "--link-gbs", 450], ["--gpus", 2, "--flops", 1e15],
    ["--gpus", 8, "--flops", 1e15, "--memory-gbs", 3000], ["--flops", 1e15],
    ["--memory-gbs", 3000], ["--gpus", 8, "--device", "cpu"], ["--gpus", 64, "--json"],
], ids=str)  # fmt: skip
def test_processors_here_are_not_planned_with_links_of_gpus(planned, flags):
    code, out, err = planned("--preset", "nano", *flags)
    assert (code, out) == (2, "")
    assert "name the card with --gpu: h200, h100, a100-80" in err and err.count("\n") == 1
    assert len(err) <= 301


def test_a_described_gpu_needs_no_card(planned):
    flags = ["--flops", 1e15, "--memory-gbs", 3000]
    code, out, _ = planned("--preset", "nano", *flags, "--gpus", 16, "--link-gbs", 100)
    assert code == 0 and "16 x a GPU as given" in out and "unknown: needs" in out
    code, out, _ = planned("--preset", "nano", *flags, "--memory-gib", 24, "--json")
    found = json.loads(out)
    assert found["gpu"]["memory_bytes"] == 24 * GIB and found["verdict"]["fits"]
    assert found["gpu"]["dtype"] == "bfloat16"


def test_a_card_is_planned_as_train_py_would_run_on_it(planned):
    """The preset of a GPU, its dtype, and refusals of what it cannot do."""
    for card, dtype in (("rtx-3090", "bfloat16"), ("t4", "float16"), ("v100", "float16")):
        _, out, _ = planned("--gpu", card, "--json")
        found = json.loads(out)
        assert found["gpu"]["dtype"] == dtype
        assert found["flops"]["steps"] == PRESETS["tiny"]["steps"]
    assert planned("--gpu", "h100", "--device", "cuda")[0] == 0
    for flags, said in (
        (["--gpu", "t4", "--dtype", "bf16"], "has no bf16"),
        (["--gpu", "v100", "--kernels", "triton"], "older than sm_80"),
        (["--gpu", "h100", "--device", "cpu"], "exclude each other"),
        (["--gpu", "rtx4009"], "did you mean rtx-4090?"),
    ):
        code, _, err = planned(*flags)
        assert code == 2 and said in err


def test_links_are_those_of_the_card(planned):
    _, out, _ = planned("--gpu", "h100", "--gpus", 64)
    assert "450 GB/s" in out and "NVLink 4" in out and "8 nodes of 8" in out
    assert "50 GB/s per GPU between nodes" in " ".join(out.split())
    _, out, _ = planned("--gpu", "4090", "--gpus", 8)
    assert "NVLink" not in out and "PCIe 4.0 x16" in out


def test_a_step_that_is_over_before_its_kernels_are_launched_is_no_estimate(planned):
    """A small model on a large card: the arithmetic alone is a lower bound of its time."""
    small = " ".join(planned("--preset", "nano", "--gpu", "h100")[1].split())
    assert "time at least " in small and "launching its kernels" in small
    large = " ".join(planned("--preset", "large", "--gpu", "h100")[1].split())
    assert "at least" not in large and "launching" not in large


# Whether it fits


def test_the_verdict_by_hand(planned):
    """small on a V100: 16 N bytes of states in fp32 and so much per sequence, of 0.9 x 15.7 GiB."""
    flags = ["--preset", "small", "--gpu", "v100", "--batch-size", 64]
    _, out, _ = planned(*flags, "--micro-batch-size", 64, "--json")
    found = json.loads(out)
    shape = {k: v for k, v in PRESETS["small"].items() if k in ModelConfig.__dataclass_fields__}
    config = ModelConfig(**{"vocab_size": 4096} | shape)
    one, more = made_up_line(config, torch.float16)
    usable = 0.9 * 15.7 * GIB
    by_hand = {n: 16 * n_parameters(config) + one + (n - 1) * more for n in range(1, 4097)}
    most = max(n for n, need in by_hand.items() if need <= usable)
    v = found["verdict"]
    assert v["needed_bytes"] == pytest.approx(by_hand[64]) and v["micro_batch"] == 64
    assert v["usable_bytes"] == pytest.approx(usable)
    assert v["most_sequences"] == most
    assert v["largest_micro_batch"] == max(d for d in (1, 2, 4, 8, 16, 32, 64) if d <= most)
    assert v["fits"] == (by_hand[64] <= usable)
    _, out, _ = planned(*flags, "--json")  # left open, it is the largest that fits, as in training
    v = json.loads(out)["verdict"]
    assert v["fits"] and v["micro_batch"] == v["largest_micro_batch"]


def test_what_does_not_fit_says_what_would(planned):
    flags = ["--preset", "large", "--gpu", "rtx-4090", "--gpus", 8, "--micro-batch-size", 64]
    code, out, _ = planned(*flags)
    assert code == 0 and out.startswith("verdict     does not fit: needs ")
    found = json.loads(planned(*flags, "--json")[1])["verdict"]
    assert found["fits"] is False and found["advice"]
    for advice in found["advice"]:
        words = dict(zip(flags[::2], flags[1::2], strict=True))
        extra = advice.split()
        if extra == ["--activation-checkpointing"]:
            changed = [*flags, *extra]
        else:
            words[extra[0]] = extra[1]
            changed = [w for pair in words.items() for w in pair]
        assert json.loads(planned(*changed, "--json")[1])["verdict"]["fits"], advice


def sane(found: dict) -> None:
    """Assert that every number of a plan is finite and none is negative."""
    if isinstance(found, dict):
        for value in found.values():
            sane(value)
    elif isinstance(found, int | float):
        assert math.isfinite(found) and found >= 0


def check_grid(presets):
    """Every preset on every card, stage and number of GPUs: monotone, and consistent verdicts."""
    known = ModelConfig.__dataclass_fields__
    for preset in presets:
        shape = {k: v for k, v in PRESETS[preset].items() if k in known}
        config = ModelConfig(**{"vocab_size": 4096} | shape)
        lines: dict = {}
        for card in CARDS:
            capacity = Capacity(card.memory_gib * GIB, 0.9, "")
            budget = Budget(torch.bfloat16, True, capacity, lines)
            for stage in plan.STAGES:
                before = math.inf
                for ranks in GPUS:
                    job = Job(config, ranks, 64 * 8, 8, 2)
                    need, largest = budget.needed(job, stage), budget.largest(job, stage)
                    assert 0 < need <= before, (preset, card.name, stage, ranks)
                    before = need
                    assert budget.needed(job, stage, 4) < need < budget.needed(job, stage, 16)
                    assert budget.fits(job, stage) == (need <= capacity.usable)
                    verdict = plan_fit.judge(budget, job, stage, card.name)
                    assert verdict.fits == (largest >= 8) and largest <= verdict.most
                    assert job.share % (largest or 1) == 0
                    assert not largest or budget.fits(job, stage, largest)
                    assert not budget.fits(job, stage, verdict.most + 1)
                    assert verdict.fits or verdict.advice
                    sane(verdict.raw)


def test_every_plan_of_the_table_is_sane(monkeypatch):
    monkeypatch.setattr(plan_fit.activations, "activation_line", made_up_line)
    monkeypatch.setattr(plan, "memory", cache(plan.memory))  # the same on every card
    check_grid(PRESETS)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "nano-recurrent", "nanogpt-124m"])
def test_every_plan_is_sane_with_counted_activations(preset):
    check_grid([preset])


# As text


@pytest.mark.parametrize("flags", [
    ["--preset", "large", "--gpu", "h200", "--gpus", 64, "--zero", 3, "--steps", 100000],
    ["--preset", "large", "--gpu", "t4", "--gpus", 8, "--micro-batch-size", 64],
    ["--preset", "nano-recurrent", "--optimizer", "adamw", "--gpu", "v100", "--gpus", 16],
    ["--preset", "nano"], ["--gpu", "a100", "--zero", 2, "--offload", "--gpus", 1024,
     "--batch-size", 4096],
], ids=str)  # fmt: skip
def test_the_plan_fits_80_columns_and_has_no_empty_cells(planned, flags):
    code, out, err = planned(*flags)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert not re.search(r"\d[eE][+-]?\d", out)  # 2.021e+04 s
    assert not re.search(r" -( |$)", out, re.MULTILINE)


@pytest.mark.parametrize("seconds, words", [
    (0, "0 s"), (5.3e-6, "5.3 us"), (0.0123, "12.3 ms"), (12.44, "12.4 s"), (59.97, "1 min"),
    (312, "5 min 12 s"), (8040, "2 h 14 min"), (20210, "5 h 37 min"), (3.2 * 86400, "3.2 days"),
    (1e9, "31.7 years"),
])  # fmt: skip
def test_times_are_written_as_people_do(seconds, words):
    assert units.span(seconds) == words


def test_counts_and_sizes_are_written_as_people_do():
    assert [units.count(n) for n in (0, 768, 836_672, 123_532_032, 10.5e9)] == [
        "0", "768", "837 K", "124 M", "10.5 B",
    ]  # fmt: skip
    assert [units.si(n, "FLOP") for n in (12, 642e6, 3.365e14)] == [
        "12 FLOP", "642 MFLOP", "336 TFLOP"
    ]  # fmt: skip
    assert [units.size(n) for n in (512, 5.4 * 2**20, 41.2 * GIB)] == [
        "512 B", "5.4 MiB", "41.2 GiB"
    ]  # fmt: skip
