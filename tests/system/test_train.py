"""train.py from the command line to the run folder: what it leaves, and that it can go on."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm import __main__ as verbs
from minillm.checkpoint.find import load_run, open_checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.config.presets import PRESETS
from minillm.config.sampling import SamplingParams
from minillm.config.train import ModelConfig
from minillm.data.batches import evaluation_windows
from minillm.data.shards import open_corpus
from minillm.distributed.ranks import Ranks
from minillm.distributed.strategies import shard
from minillm.inference.generate import generate
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from minillm.runtime import files as storage
from minillm.training import begin, microbatch
from minillm.training.evaluate import evaluate
from minillm.training.gradients import accumulate
from minillm.training.steps import steps
from tests.conftest import SAMPLED
from tests.support.broad import broad

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "char_cpu.txt"
JUDGED = {"val_loss", "val_bpb", "val_tokens"}


def metrics(run: Path, key: str = "loss") -> dict[int, float]:
    """step -> value, of the rows of metrics.jsonl that have `key`."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


def steps_kept(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").iterdir())


def tensors(run: Path, step: int) -> dict[str, bytes]:
    """The files of tensors of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def test_what_a_run_leaves(tiny_run):
    names = {p.relative_to(tiny_run).as_posix() for p in tiny_run.rglob("*") if p.is_file()}
    inner = {"model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors",
             "ema-00001-of-00001.safetensors", "state.json", "manifest.json"}  # fmt: skip
    kept = {f"checkpoints/step-0000000{s}/{name}" for s in (4, 8) for name in inner}
    plain = {"config.json", "tokenizer.json", "metrics.jsonl", "samples.txt", "lock"}
    assert names == plain | kept


def test_what_config_json_says(tiny_run, text_file):
    config = storage.read_json(tiny_run / "config.json")
    assert config["versions"].keys() == {"minillm", "python", "torch", "triton"}
    assert config["versions"]["torch"] == torch.__version__
    assert (config["threads"], config["dtype"], config["micro_batch_size"]) == (1, "fp32", 4)
    assert config["model"]["vocab_size"] == 257 and config["model"]["bos_id"] == 256
    assert (tiny_run / config["train"]["data"]).resolve() == text_file and config["train"][
        "ema"
    ] == 0.9
    tokenizer = tiny_run / "tokenizer.json"
    assert config["tokenizer_sha256"] == storage.file_digest(tokenizer)
    assert RunFolder(tiny_run).corpus() == (tiny_run / config["corpus"]).resolve()


def test_what_metrics_say(tiny_run):
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    every_step = {"step", "tokens", "loss", "lr", "grad_norm", "step_ms", "tokens_per_s", "mfu",
                  "peak_memory_mib"}  # fmt: skip
    steps, final = rows[:-1], rows[-1]
    assert [row["step"] for row in steps] == list(range(1, 9))
    for row in steps:
        evaluated = JUDGED if row["step"] == 4 else set()
        assert row.keys() == every_step | evaluated
        assert row["tokens"] == row["step"] * 4 * 16
        assert row["tokens_per_s"] == pytest.approx(64 / row["step_ms"] * 1e3, rel=1e-3)
        assert 0 < row["mfu"] < 1
    assert final.keys() == {"step", "tokens"} | JUDGED and final["step"] == 8
    # Bytes are the tokens, but for one BOS.
    assert final["val_bpb"] == pytest.approx(final["val_loss"] / math.log(2), rel=0.01)


def test_what_is_judged_and_shown_is_what_can_be_loaded(tiny_run):
    """The averaged weights of the last checkpoint, over the whole split."""
    model, tokenizer, config = load_run(tiny_run)
    corpus = open_corpus(RunFolder(tiny_run).corpus())
    result = evaluate(model, evaluation_windows(corpus, "val", config.seq_len), 4)
    assert metrics(tiny_run, "val_loss")[8] == pytest.approx(result.loss, rel=2e-6)
    # As it was while training: load_run lays the matrices out for decoding, which rounds otherwise.
    model = GPT(config, EAGER)
    open_checkpoint(tiny_run).load_into(model)
    params = SamplingParams(max_tokens=SAMPLED, temperature=0.8, top_p=0.95, seed=1337)
    made = generate(
        model, [tokenizer.prompt_ids("")], params, stop=lambda row, ids: ids[-1] == tokenizer.bos_id
    )
    text = tokenizer.decode([token.id for token in made])
    assert (tiny_run / "samples.txt").read_bytes().decode().endswith(f"=== step 8\n{text}\n")


def test_samples_are_kept_and_the_last_is_printed(train, tmp_path, capfd):
    assert train("--out", tmp_path / "run", "--sample-every", "3") == 0
    said = (tmp_path / "run" / "samples.txt").read_bytes().decode()
    parts = said.split("=== step ")[1:]
    assert [part.split("\n")[0] for part in parts] == ["3", "6", "8"]
    out, err = capfd.readouterr()
    assert out == parts[-1].removeprefix("8\n")
    for word in ("model", "text", "machine", "training  8 steps of 4 x 16 tokens", "about",
                 "warning   ", "fewer than the", "validation: ", "sample it:"):  # fmt: skip
        assert word in err


def test_many_passes_over_the_text_are_warned_of(train, tmp_path, capfd):
    assert train("--out", tmp_path / "run", "--epochs", "4.5", "--batch-size", "64") == 0
    assert "warning   the run passes 4.5 times over its" in capfd.readouterr().err


def test_a_warmup_longer_than_the_run_is_warned_of(train, tmp_path, capfd):
    assert train("--out", tmp_path / "run", "--warmup", "20") == 0
    assert "warning   --warmup 20 is most of the 8 steps" in capfd.readouterr().err
    assert train("--out", tmp_path / "other", "--warmup", "4") == 0
    assert "--warmup" not in capfd.readouterr().err


@pytest.mark.parametrize("device, preset", [("cuda", "tiny"), ("cpu", "nano")])
def test_the_device_of_a_config_file_picks_the_preset(
    train, tmp_path, monkeypatch, capsys, device, preset
):
    """The one that the command line names comes before it."""
    pick = {"auto": "cpu"}
    monkeypatch.setattr(begin.device, "pick_device", lambda n: torch.device(pick.get(n, n)))
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"device": device, "steps": 3}))
    for flags, expected in (([], preset), (["--device", "cpu"], "nano")):
        assert train("--config", path, "--print-config", *flags) == 0
        assert json.loads(capsys.readouterr().out)["preset"] == expected


def test_the_evaluation_at_the_end_may_be_a_part(train, tmp_path, capfd):
    """In batches of 4 x 16 tokens, spread over the split of 627; the whole of it is the default."""
    for name, flags in (("part", ["--final-eval-batches", "3"]), ("whole", [])):
        assert train("--out", tmp_path / name, *flags) == 0
    part, whole = (metrics(tmp_path / name, "val_tokens") for name in ("part", "whole"))
    assert part == {4: 128, 8: 192} and whole == {4: 128, 8: 626}
    loss = [metrics(tmp_path / name, "val_loss")[8] for name in ("part", "whole")]
    assert loss[0] == pytest.approx(loss[1], rel=0.02) and loss[0] != loss[1]


FLAVOURS = {
    "adamw": ["--optimizer", "adamw", "--learning-rate", "0.01"],
    "muon": ["--optimizer", "muon"],
    "ema": ["--ema", "0.9"],
    "dropout": ["--dropout", "0.1", "--micro-batch-size", "2", "--optimizer", "adamw"],
    "cosine": ["--schedule", "cosine", "--warmup", "9", "--weight-decay", "0.1"],
    "bf16": ["--dtype", "bf16"],
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_run_that_was_broken_off_goes_on_to_the_same_end(train, tmp_path, flavour):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    flags = ["--steps", "15", "--save-every", "7", "--keep-last", "9", *FLAVOURS[flavour]]
    assert train("--out", straight, *flags) == 0
    shutil.copytree(straight, broken)
    for step in steps_kept(broken):
        if step > 7:
            shutil.rmtree(broken / "checkpoints" / f"step-{step:08d}")
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')
    assert max(steps_kept(broken)) == 7
    assert train("--resume", broken) == 0
    assert tensors(broken, 15) == tensors(straight, 15)
    assert len(tensors(straight, 15)) == (3 if flavour == "ema" else 2)
    for key in ("loss", "lr", "grad_norm", "tokens", "val_loss", "val_bpb"):
        assert metrics(broken, key) == metrics(straight, key)
    assert list(metrics(broken)) == list(range(1, 16))


@broad("flavour", ["adamw", "muon", "dropout"], quick=(1,))
def test_more_steps_than_were_planned(train, tmp_path, flavour):
    flags = ["--schedule", "constant", *FLAVOURS[flavour]]
    assert train("--out", tmp_path / "a", "--steps", "15", *flags) == 0
    assert train("--out", tmp_path / "b", "--steps", "7", *flags) == 0
    assert train("--resume", tmp_path / "b", "--steps", "15") == 0
    assert tensors(tmp_path / "a", 15) == tensors(tmp_path / "b", 15)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_resume_keeps_what_was_decided(train, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    monkeypatch.setattr(microbatch, "available_memory", lambda device: 600_000)
    assert train("--out", run, "--batch-size", "12") == 0
    decided = storage.read_json(run / "config.json")["micro_batch_size"]
    assert 1 <= decided < 12 and 12 % decided == 0
    monkeypatch.undo()
    assert train("--resume", run, "--steps", "9") == 0
    assert f"{decided} sequences at a time" in capfd.readouterr().err
    assert open_checkpoint(run).state["fixed"]["micro_batch_size"] == decided


def test_resume_alone_takes_the_newest_run(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("--out", "runs/a") == 0
    assert train("--resume", "--steps", "9") == 0
    assert steps_kept(tmp_path / "runs" / "a")[-1] == 9


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_a_resume_prepares_the_text_again_if_need_be(train, tmp_path, tokenizer):
    run, cache = tmp_path / "run", tmp_path / "cache"
    flags = ["--tokenizer", tokenizer, "--cache-dir", cache]
    assert train("--out", run, "--steps", "2", *flags) == 0
    shutil.rmtree(cache)
    assert train("--resume", run, "--steps", "3") == 0


def test_without_a_name_runs_are_numbered(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("--steps", "1") == train("--steps", "1") == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["nano-1", "nano-2"]


def test_micro_batches_give_the_gradient_of_the_batch():
    config = ModelConfig(vocab_size=13, seq_len=8, n_layer=2, n_head=2, d_model=16)
    generator = torch.Generator().manual_seed(0)
    model = GPT(config, EAGER, torch.float64, generator).double()
    tokens, targets = torch.randint(13, (2, 4, 8), generator=generator)
    targets[1, 3:] = -100
    targets[3, :6] = -100
    found = {}
    for micro in (4, 2, 1, 3):
        model.zero_grad()
        alone = shard(model, [], Ranks())
        loss = accumulate(alone, tokens, targets, torch.zeros(4), micro, [None])
        found[micro] = [loss.double(), *(p.grad.clone() for p in model.parameters())]
    logp = model(tokens).log_softmax(-1)[targets != -100]
    direct = -logp.gather(-1, targets[targets != -100][:, None]).mean()
    model.zero_grad()
    direct.backward()
    truth = [direct.detach(), *(p.grad for p in model.parameters())]
    for results in found.values():
        torch.testing.assert_close(results, truth, rtol=1e-6, atol=1e-9)


def test_micro_batches_give_the_same_losses(train, tmp_path):
    for micro in ("1", "2", "4"):
        flags = ["--optimizer", "adamw", "--learning-rate", "0.01", "--micro-batch-size", micro]
        assert train("--out", tmp_path / micro, *flags) == 0
    whole = metrics(tmp_path / "4")
    for micro in ("1", "2"):
        assert metrics(tmp_path / micro) == pytest.approx(whole, rel=1e-5)


def test_the_loss_really_goes_down(train, tmp_path):
    assert train("--out", tmp_path / "run", "--steps", "80", "--eval-every", "0") == 0
    losses = metrics(tmp_path / "run")
    assert losses[1] == pytest.approx(math.log(257), rel=0.05)
    assert losses[80] < 0.6 * losses[1]
    assert metrics(tmp_path / "run", "val_loss")[80] < 0.6 * losses[1]


def test_a_golden_loss_curve(train, tmp_path):
    """A change of these numbers needs a reason in the commit that makes it."""
    flags = (
        "--tokenizer char --val-fraction 0.1 --n-layer 2 --n-head 2 --d-model 32 --d-ff 128 "
        "--seq-len 32 --position rope --norm rmsnorm --mlp swiglu --qk-norm --init gpt2 "
        "--optimizer adamw --learning-rate 0.003 --min-learning-rate 0.0003 --schedule cosine "
        "--warmup 4 --weight-decay 0.1 --beta1 0.9 --beta2 0.95 --grad-clip 1 --batch-size 8 "
        "--micro-batch-size 8 --seed 1337 --steps 20"
    ).split()
    assert train("--out", tmp_path / "run", *flags) == 0
    losses = list(metrics(tmp_path / "run").values())
    golden = [float(x) for x in GOLDEN.read_text().split()] if GOLDEN.exists() else []
    now = "\n".join(map(str, losses))
    assert losses == pytest.approx(golden, rel=1e-4), f"the losses are now\n{now}"


def test_a_time_limit(train, tmp_path):
    """It is kept, and the rate comes down with it, however seldom anything is logged."""
    seldom = ["--log-every", "100000", "--eval-every", "0"]
    assert train("--out", tmp_path / "run", "--time-limit", "1.5s", *seldom) == 0
    state = open_checkpoint(tmp_path / "run").state
    assert 1.0 < state["progress"]["trained_s"] < 3
    assert state["pace"][0] == [0, 0.0] and state["pace"][-1] == [state["step"], 1.0]
    rates = metrics(tmp_path / "run", "lr")
    assert list(rates) == [state["step"]]
    assert rates[state["step"]] < 0.1 * PRESETS["nano"]["learning_rate"]
    # What was decided is recorded: a resume has nothing left to do.
    assert train("--resume", tmp_path / "run") == 0
    assert open_checkpoint(tmp_path / "run").step == state["step"]


def test_early_stop(train, tmp_path, capfd):
    """With a rate of 0 nothing is ever gained: the first evaluation is the best."""
    flags = ["--learning-rate", "0", "--steps", "40", "--eval-every", "3", "--early-stop", "2"]
    assert train("--out", tmp_path / "run", *flags) == 0
    assert max(metrics(tmp_path / "run")) == 9
    assert "stopping early: 2 evaluations without gain" in capfd.readouterr().err
    # That was its end, until more is asked for.
    assert train("--resume", tmp_path / "run") == 0
    assert max(metrics(tmp_path / "run")) == 9


def test_the_best_checkpoint_is_kept(train, tmp_path):
    def evaluate(setup, state, *args, **options):
        return {"val_loss": 1.0 + abs(state.progress.step - 6), "val_bpb": 1.0}

    flags = ["--steps", "12", "--eval-every", "2", "--keep-last", "1"]
    assert train("--out", tmp_path / "run", *flags, evaluate=evaluate) == 0
    assert open_checkpoint(tmp_path / "run", "best").step == 6
    assert steps_kept(tmp_path / "run") == [6, 12]
    assert train("--out", tmp_path / "none", *flags, "--no-keep-best", evaluate=evaluate) == 0
    assert steps_kept(tmp_path / "none") == [12]


def test_init_from(train, tmp_path, tiny_run):
    flags = ["--init-from", tiny_run, "--steps", "1", "--learning-rate", "0"]
    assert train("--out", tmp_path / "run", *flags) == 0
    old, new = load_run(tiny_run)[0], load_run(tmp_path / "run")[0]
    assert old.config == new.config
    # It starts from the averaged weights, and a rate of 0 leaves them.
    for p, q in zip(old.parameters(), new.parameters(), strict=True):
        assert torch.equal(p, q)
    theirs, ours = (run / "tokenizer.json" for run in (tiny_run, tmp_path / "run"))
    assert theirs.read_bytes() == ours.read_bytes()
    # It goes on without the run it came from.
    other = shutil.copytree(tiny_run, tmp_path / "other")
    cache = tmp_path / "cache"
    flags = ["--init-from", other, "--steps", "1", "--cache-dir", cache]
    assert train("--out", tmp_path / "second", *flags) == 0
    shutil.rmtree(other)
    shutil.rmtree(cache)
    assert train("--resume", tmp_path / "second", "--steps", "2") == 0


def test_init_from_accepts_what_the_other_run_is(train, tmp_path, tiny_run, text_file):
    flags = ["--init-from", tiny_run, "--d-model", "16", "--n-layer", "1", "--tokenizer", "byte"]
    assert train("--out", tmp_path / "run", *flags, "--steps", "1") == 0
    file = tiny_run / "tokenizer.json"
    assert train("--init-from", tiny_run, "--tokenizer", file, "--print-config") == 0
    for wrong in (["--d-model", "32"], ["--tokenizer", "char"]):
        assert train("--init-from", tiny_run, *wrong, "--print-config") == 2


def test_epochs(train, tmp_path, text_file):
    assert train("--out", tmp_path / "run", "--epochs", "0.5") == 0
    corpus = RunFolder(tmp_path / "run").corpus()
    shards = storage.read_json(corpus / "index.json")["shards"]
    tokens = sum(s["tokens"] for s in shards if s["name"].startswith("train"))
    windows = (tokens - 16) // 16
    assert max(metrics(tmp_path / "run")) == math.ceil(windows / 2 / 4)


def test_a_second_run_finds_the_text_prepared(train, tmp_path, capfd):
    assert train("--out", tmp_path / "run", "--cache-dir", tmp_path / "cache") == 0
    assert "preparing" in capfd.readouterr().err
    flags = ["--overwrite", "--cache-dir", tmp_path / "cache"]
    assert train("--out", tmp_path / "run", *flags) == 0
    said = capfd.readouterr().err
    assert "found prepared" in said and "preparing" not in said


def test_without_a_validation_split(train, tmp_path):
    assert train("--out", tmp_path / "run", "--val-fraction", "0") == 0
    assert metrics(tmp_path / "run", "val_loss") == {}
    assert steps_kept(tmp_path / "run") == [8]


def test_a_document_mask_and_learned_positions(train, tmp_path):
    flags = ["--document-mask", "--position", "learned", "--window", "5", "--ema", "0.5"]
    assert train("--out", tmp_path / "run", *flags) == 0


def test_the_largest_seed_with_dropout(train, tmp_path):
    assert train("--out", tmp_path / "run", "--seed", 2**63 - 1, "--dropout", "0.1") == 0


def test_print_config_is_what_config_takes(train, tmp_path, capsys):
    flags = ["--position", "alibi", "--no-bias", "--learning-rate", "0.004", "--print-config"]
    assert train("--out", tmp_path / "run", *flags) == 0
    text = capsys.readouterr().out
    printed = json.loads(text)
    assert printed["position"] == "alibi" and printed["learning_rate"] == 0.004
    assert printed["steps"] == 8 and "time_limit" not in printed
    path = tmp_path / "printed.json"
    path.write_text(text)
    words = [sys.executable, "-m", "minillm", "train", "--config", path, "--print-config"]
    again = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert again.stdout == text and not (tmp_path / "run").exists()


def test_a_config_file_decides_and_flags_overrule_it(train, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('steps = 3\nd-ff = 24\nposition = "alibi"\nlearning_rate = 0.5\n')
    flags = ["--config", path, "--position", "none"]
    assert train("--out", tmp_path / "run", *flags) == 0
    config = storage.read_json(tmp_path / "run" / "config.json")
    assert config["train"]["steps"] == 3 and config["train"]["learning_rate"] == 0.5
    assert config["model"]["d_ff"] == 24 and config["model"]["position"] == "none"


def test_a_loss_that_is_not_finite_costs_one_step(train, tmp_path, capfd):
    calls = []

    def spoilt(*args):
        calls.append(1)
        return accumulate(*args) * (math.nan if len(calls) == 6 else 1)

    flags, spoiling = ["--save-every", "5", "--no-keep-best"], partial(steps, accumulate=spoilt)
    assert train("--out", tmp_path / "run", *flags, steps=spoiling) == 0
    assert "warning   step 6 left out: loss nan" in capfd.readouterr().err
    weights = [
        load_file(f"{tmp_path}/run/checkpoints/step-{step:08d}/model-00001-of-00001.safetensors")
        for step in (5, 8)
    ]
    assert all(w.isfinite().all() for each in weights for w in each.values())


def environment(**more: str) -> dict[str, str]:
    """This environment, in which a process outside the checkout finds minillm."""
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "", **more}


def test_the_verbs(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["minillm", *words])
        return verbs.main(), capsys.readouterr()

    code, streams = run("--help")
    assert code == 0 and "VERB" in streams.out and "[flags]" in streams.out
    for verb in ("train", "sample", "prepare"):
        assert f"\n  {verb} " in streams.out
        code, help_text = run(verb, "--help")
        assert code == 0 and "usage:" in help_text.out and not help_text.err
    code, streams = run("--version")
    assert code == 0 and streams.out.startswith("minillm ")


def test_help_tells_defaults_units_and_other_names(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minillm", "train", "--help", "all"])
    assert verbs.main() == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("--block-size = --seq-len", "--max-iters = --steps", "(default: 1337)",
                 "context length in tokens", "such as 90s, 10m or 2h"):  # fmt: skip
        assert word in text


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGPIPE")
@pytest.mark.parametrize("words", [["--print-config"], ["--help"]])
def test_a_reader_that_goes_away_leaves_no_traceback(tmp_path, words):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "minillm", "train", *words],
        cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    os.close(writer)
    assert done.stderr == b"" and done.returncode in (0, 141)


def test_closed_and_narrow_streams(train, tmp_path, tiny_run):
    """No standard input or output at all, and an output that knows no character beyond ASCII."""
    command = [sys.executable, "-m", "minillm", "sample", str(tiny_run), "--interactive"]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&-', "sh", *command],
        stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert closed.returncode == 0 and b"Traceback" not in closed.stderr
    narrow = subprocess.run(
        command, input=b"a\n\xff\n", capture_output=True,
        env=environment(PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    assert narrow.returncode == 0 and b"Traceback" not in narrow.stderr
    assert narrow.stdout.startswith(b"a")


@broad(
    "flags", [["--zero", "1"], ["--zero", "2", "--offload"], ["--zero", "3"]], quick=(1, 2), ids=str
)
@broad("optimizer", ["adamw", "muon"])
def test_stages_of_one_rank_alone(train, tmp_path, flags, optimizer):
    """Nothing is sent, the numbers are the same, and each goes on from what the other saved."""
    if optimizer == "muon" and "3" in flags:
        pytest.skip("refused: tests/system/test_bad_input.py")
    common = ["--optimizer", optimizer, "--ema", "0", "--log-every", "1"]
    assert train("--out", tmp_path / "a", *common) == 0
    assert train("--out", tmp_path / "b", *common, *flags) == 0
    assert metrics(tmp_path / "a") == pytest.approx(metrics(tmp_path / "b"), rel=1e-5)
    more = ["--steps", "12"]
    assert train("--resume", tmp_path / "a", *flags, *more) == 0
    offload = ["--no-offload"] if "--offload" in flags else []
    assert train("--resume", tmp_path / "b", "--zero", "0", *offload, *more) == 0
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert a == pytest.approx(b, rel=1e-5) and max(a) == 12
