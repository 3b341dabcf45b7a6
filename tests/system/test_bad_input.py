"""Bad input to train.py, sample.py and the verbs: its exit code, and one line that says what is
wrong. Codes: 2 usage, 3 a damaged file, 4 the environment lacks something, 5 I/O.
"""

import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm import __main__ as verbs
from minillm.checkpoint.run_folder import RunFolder
from minillm.runtime import device, files as storage, program
from minillm.scripts import sample, train as train_script

POSIX = pytest.mark.skipif(os.name != "posix", reason="not on this system")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

# Flags of train.py, code, a part of the message. {t}: a folder with what `place` puts there.
TRAIN = [
    # The command line.
    (["--stpes", "3"], 2, "unknown flag --stpes; did you mean --steps?"),
    (["--lrr", "3"], 2, "unknown flag --lrr; did you mean --lr?"),
    (["--lr", "30"], 2, "argument --learning-rate: 30.0 is out of range"),
    (["--learn", "1"], 2, "unknown flag --learn; flags that begin so: --learning-rate"),
    (["--n_lyaer=3"], 2, "unknown flag --n-lyaer; did you mean --n-layer?"),
    (["words.txt"], 2, "unexpected argument 'words.txt'"),
    (["--seed", "1", "--seed", "2"], 2, "--seed is given twice; give it once"),
    (["--steps", "1", "--max-iters", "2"], 2, "--steps is given twice"),
    (["--seed"], 2, "argument --seed: expected one argument"),
    (["--preset", "nanno"], 2, "'nanno' is not one of nano, tiny"),
    (["--optimizer", "sgd"], 2, "'sgd' is not one of adamw, muon"),
    *((["--learning-rate", bad], 2, f"'{bad}' is not a finite number")
      for bad in ("nan", "inf", "1e999")),
    (["--learning-rate", "abc"], 2, "'abc' is not a number"),
    (["--learning-rate", "-1"], 2, "out of range; expected between 0 and 10"),
    *((["--steps", bad], 2, "out of range; expected between 1 and 1000000000")
      for bad in ("0", "-1", "2000000000")),
    *((["--steps", bad], 2, "is not a whole number") for bad in ("1.5", "1e9", "", "ten")),
    (["--seed", "-1"], 2, "-1 is out of range"),
    (["--seed", str(2**64)], 2, "out of range; expected between 0 and"),
    (["--epochs", "1e308"], 2, "out of range; expected between 1e-06 and 1000000"),
    (["--steps", "2", "--epochs", "1"], 2, "--steps and --epochs exclude each other"),
    (["--early-stop", "2", "--eval-every", "0"], 2, "--early-stop needs --eval-every and"),
    (["--early-stop", "2", "--val-fraction", "0"], 2, "--val-fraction above 0"),
    (["--time-limit", "soon"], 2, "'soon' is not a duration such as 90s, 10m or 2h"),
    (["--time-limit", "9" * 306], 2, "argument --time-limit: '9999"),
    (["--threads", "0"], 2, "--threads: 0 is out of range"),
    (["--threads", "many"], 2, "--threads: 'many' is not a whole number, or auto"),
    (["--min-learning-rate", "0.5", "--learning-rate", "0.1"], 2,
     "--min-learning-rate 0.5 is above --learning-rate 0.1"),
    (["--micro-batch-size", "3"], 2, "--micro-batch-size 3 does not divide --batch-size 4"),
    (["--micro-batch-size", "5"], 2, "--micro-batch-size: 5 is out of range"),
    (["--zero", "4"], 2, "argument --zero: 4 is out of range; expected between 0 and 3"),
    (["--zero", "3", "--optimizer", "muon"], 2, "--zero 3 splits the matrices that muon needs"),
    (["--offload"], 2, "--offload needs --zero 1 or --zero 2"),
    (["--ema", "0.9", "--zero", "1"], 2, "--ema averages whole weights; drop it, or use --zero 0"),
    (["--bias", "maybe"], 2, "'maybe' is not true or false"),
    # The model.
    (["--n-head", "7", "--d-model", "128"], 2,
     "--n-head 7 does not divide --d-model 128; nearest: 8"),
    (["--n-head", "4", "--n-kv-head", "3", "--d-model", "32"], 2, "--n-kv-head 3 does not divide"),
    (["--n-layer", "0"], 2, "0 is out of range; expected between 1 and"),
    (["--vocab-size", "0"], 2, "0 is out of range; expected between 1 and"),
    (["--vocab-size", str(2**31)], 2, "is out of range; expected between 1 and"),
    (["--vocab-size", "300"], 2, "--vocab-size 300: this tokenizer has 257 tokens"),
    (["--vocab-size", "300", "--tokenizer", "char"], 2, "--vocab-size is for bpe"),
    (["--dropout", "1.0"], 2, "out of range; expected between 0 and 0.99"),
    (["--dropout", "-0.1"], 2, "out of range; expected between 0 and 0.99"),
    (["--seq-len", "0"], 2, "0 is out of range"),
    (["--seq-len", "100000"], 2, "one sequence takes 100001; give more text or --seq-len "),
    (["--d-head", "3"], 2, "--position rope needs an even --d-head; got 3"),
    (["--init", "zero", "--tie-embeddings"], 2, "--init zero would zero the embedding"),
    (["--document-mask", "--tokenizer", "char"], 2, "--tokenizer char has none"),
    (["--d-model", str(2**20), "--n-layer", "10000"], 4, "GiB to train and"),
    (["--d-ff", str(2**24), "--d-model", "65536"], 4, "reduce --d-model or --n-layer"),
    # The machine.
    pytest.param(["--device", "cuda"], 4, "--device cuda: 0 CUDA devices here; use", marks=NO_GPU),
    (["--device", "cuda:99"], 4, "--device cuda:99: "),
    (["--device", "gpu"], 2, "--device 'gpu' is not one of auto, cpu, cuda"),
    (["--kernels", "triton", "--device", "cpu"], 4, "--kernels triton"),
    # The text.
    (["--data", "{t}/none.txt"], 2, "none.txt: no such file or folder"),
    *(([flag, ""], 2, f"{flag} is empty") for flag in ("--data", "--cache-dir", "--init-from")),
    (["--data", "{t}/*.none"], 2, "no file matches this pattern"),
    (["--data", "{t}/empty"], 2, "no text in this folder"),
    (["--data", "{t}/no\nname"], 2, "no such file or folder"),
    (["--data", "{t}/no\udcffname"], 2, "no such file or folder"),
    (["--data", "x" * 300], 2, "File name too long"),
    (["--data", "{t}/loop"], 2, "Too many levels of symbolic links"),
    pytest.param(["--data", "/dev/zero"], 2, "/dev/zero: not a regular file", marks=POSIX),
    pytest.param(["--data", "{t}/fifo"], 2, "fifo: not a regular file", marks=POSIX),
    (["--data", "{t}/blank.txt"], 2, "blank.txt"),
    (["--data", "{t}/one.txt"], 2, "one.txt"),
    (["--data", "{t}/latin.txt"], 2, "byte 0xe9 at offset 3 is not UTF-8"),
    (["--data", "{t}/model.pt"], 2, "model.pt: pickled files are never read; expected text"),
    (["--data", "{t}/binary.txt"], 2, "NUL byte at offset 1"),
    (["--tokenizer", "words"], 2, "--tokenizer words: no such file; expected bpe, char, byte"),
    (["--tokenizer", "{t}/model.pt"], 2, "model.pt: pickled files are never read"),
    (["--tokenizer", "{t}/empty.model"], 3, "empty.model: not a SentencePiece model"),
    (["--tokenizer", "{t}/hf.json"], 2, "a Hugging Face tokenizer.json is not read"),
    (["--tokenizer", "bpe", "--vocab-size", "9"], 2, "vocab-size"),
    # Where it goes, and where it comes from.
    (["--out", "{run}"], 2, "exists; continue it with python train.py --resume"),
    (["--out", "{t}"], 2, "holds other things than a run; name another folder"),
    (["--out", "{t}", "--overwrite"], 2, "holds other things than a run"),
    (["--out", "{t}/one.txt"], 2, "one.txt is a file; name a folder"),
    (["--out", "{t}/one.txt/run"], 2, "one.txt is not a folder; name another place"),
    (["--out", "{t}/" + "x" * 300], 2, "File name too long"),
    (["--cache-dir", "{t}/one.txt"], 2, "one.txt is not a folder; name another place"),
    (["--cache-dir", "{t}/one.txt/a/b"], 2, "one.txt is not a folder; name another place"),
    pytest.param(["--out", "/proc/run"], 5, "/proc/run: ", marks=POSIX),
    (["--resume", "{t}/none"], 2, "none: no such run"),
    (["--resume", "{t}"], 2, "is not a run of minillm: it has no config.json"),
    (["--resume", "{t}/model.pt"], 2,
     "model.pt is a file, not a run folder; pickled checkpoints are never read"),
    (["--resume", "{run}", "--out", "x"], 2, "--resume continues in the run's own folder"),
    (["--resume", "{run}", "--d-model", "32"], 2, "--d-model 32 differs from the run's 16"),
    (["--resume", "{run}", "--n-layer", "2"], 2,
     "--n-layer 2 differs from the run's 1 and cannot change on --resume; start a new run with"),
    (["--resume", "{run}", "--learning-rate", "1"], 2, "--learning-rate 1.0 differs from the"),
    (["--init-from", "{t}/model.pt"], 2, "pickled checkpoints are never read"),
    (["--init-from", "{t}/none"], 2, "none: no such run"),
    (["--init-from", "{run}", "--d-model", "32"], 2, "--d-model cannot be set with --init-from"),
]  # fmt: skip

# What a --config file holds, its name's ending, a part of the message; the code is 2.
CONFIGS = [
    ("", "json", "Expecting value"),
    ("\x00\x01\x02", "json", "Expecting value"),
    (b"\xff\xfe\x00", "toml", "not UTF-8 text at byte 0"),
    ("[" * 100_000, "json", "nested too deeply"),
    ("[1]", "json", "expected one table of settings, got list"),
    ('{"steps": 1, "steps": 2}', "json", "'steps' is given twice"),
    ('{"steps": 1, "max_iters": 2}', "json", "steps is given twice"),
    ("steps = 1\nsteps = 2\n", "toml", "Cannot overwrite a value"),
    ('{"stpes": 1}', "json", "unknown setting 'stpes'; did you mean steps?"),
    ('{"bos_id": 1}', "json", "unknown setting 'bos_id'"),
    ('{"model": {"d_model": 8}}', "json", "unknown setting 'model'"),
    ('{"steps": true}', "json", "steps = true is a bool, expected a whole number"),
    ('{"steps": "12"}', "json", 'steps = "12" is a str, expected a whole number'),
    ('{"steps": 1.5}', "json", "steps = 1.5 is a float, expected a whole number"),
    ('{"steps": [1]}', "json", "is a list, expected a whole number"),
    ('{"bias": 1}', "json", "bias = 1 is a int, expected true or false"),
    ('{"dropout": NaN}', "json", "NaN is not a finite number"),
    ('{"learning_rate": 1e999}', "json", "not a finite number"),
    ("learning_rate = nan\n", "toml", "not a finite number"),
    ('{"d_model": 0}', "json", "0 is out of range"),
    ('{"n_head": 7, "d_model": 128}', "json", "--n-head 7 does not divide --d-model 128"),
    ('{"out": "a\\u0000b"}', "json", "out holds a NUL or half a character"),
    ('{"data": "\\ud800"}', "json", "data holds a NUL or half a character"),
    ("steps: 3", "yaml", "expected a .toml or .json file"),
    (None, "json", "no such file"),
]

# Flags of sample.py after the run, code, a part of the message.
SAMPLE = [
    (["--promt", "x"], 2, "unknown flag --promt; did you mean --prompt?"),
    (["-p", "x"], 2, "unknown flag -p; flags that begin so: --prompt, --prompt-file"),
    (["-?"], 2, "unknown flag -?; see --help"),
    (["--temperature", "-1"], 2, "-1.0 is out of range; expected at least 0"),
    (["--temperature", "nan"], 2, "'nan' is not a finite number"),
    (["--temperature", "hot"], 2, "'hot' is not a number"),
    (["--top-k", "-1"], 2, "-1 is out of range; expected at least 0"),
    (["--top_p", "0"], 2, "0 is not above 0"),
    (["--top-p", "1.1"], 2, "1.1 is out of range; expected between 0 and 1"),
    (["--min-p", "-0.5"], 2, "-0.5 is out of range"),
    (["--repetition-penalty", "0"], 2, "0.0 is out of range; expected between 0.01 and 100"),
    *(
        (["--max_new_tokens", bad], 2, "is out of range; expected between 1 and 10000000")
        for bad in ("0", "-1", "1000000000")
    ),
    (["--max-tokens", "1e9"], 2, "'1e9' is not a whole number"),
    (["--num-samples", "0"], 2, "0 is out of range"),
    (["--seed", "-1"], 2, "-1 is out of range"),
    (["--seed", str(2**64)], 2, "is out of range"),
    (["--prompt"], 2, "argument --prompt: expected one argument"),
    (["--prompt", "a", "--start", "b"], 2, "--prompt is given twice"),
    (["--prompt", "a", "--prompt-file", "b"], 2, "--prompt and --prompt-file exclude each other"),
    (["--prompt", "a", "--interactive"], 2, "--interactive reads its prompts"),
    (["--prompt-file", "{t}/none"], 2, "none: no such file"),
    (["--prompt-file", "{t}/empty"], 2, "empty: is no regular file"),
    (["--prompt-file", "{t}/latin.txt"], 2, "latin.txt: not UTF-8 at byte 3"),
    pytest.param(["--prompt-file", "/dev/zero"], 2, "/dev/zero: is no regular file", marks=POSIX),
    (["--prompt", "a\udcffb"], 2, "half a character at position 1"),
    (["--checkpoint", "5"], 2, "--checkpoint 5: "),
    (["--checkpoint", "newest"], 2, "holds steps 4, 8; or last, best"),
    (["--checkpoint", "9" * 5000], 2, "--checkpoint 999"),
    (["--threads", "0"], 2, "0 is out of range"),
    pytest.param(["--device", "cuda"], 4, "--device cuda: 0 CUDA devices", marks=NO_GPU),
    (["--device", "cuda:99"], 4, "--device cuda:99: "),
    (["--device", "tpu"], 2, "--device 'tpu' is not one of"),
    (["--dtype", "fp8"], 2, "'fp8' is not one of auto, fp32, bf16"),
    (["--kernels", "tritn"], 2, "did you mean triton?"),
    (["--exit-by", "confidance"], 2, "did you mean confidence?"),
    (["--kernels", "triton", "--device", "cpu"], 4, "--kernels triton"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of unpleasant things."""
    return with_unpleasant_things(tmp_path_factory.mktemp("place"))


def with_unpleasant_things(t: Path) -> Path:
    (t / "empty").mkdir()
    (t / "blank.txt").write_text(" \n\n")
    (t / "one.txt").write_text("a")
    (t / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (t / "binary.txt").write_bytes(b"a\0b")
    (t / "empty.model").write_bytes(b"")
    (t / "hf.json").write_text('{"model": {"type": "BPE"}}')
    with zipfile.ZipFile(t / "model.pt", "w") as file:  # as torch.save writes it: a zip of a pickle
        file.writestr("model/data.pkl", b"\x80\x02}q\x00.")
    if os.name == "posix":
        os.mkfifo(t / "fifo")
        (t / "loop").symlink_to("loop")
    return t


def check(code: int, expected: int, fragment: str, name: str, capfd) -> None:
    """One error line, the last; before it lines of a run that had begun at the most."""
    out, err = capfd.readouterr()
    assert code == expected, err
    assert "Traceback" not in err and err.endswith("\n")
    lines = err.splitlines()
    assert [line.startswith(f"{name}: error: ") for line in lines] == [False] * (len(lines) - 1) + [
        True
    ], err
    assert fragment in lines[-1]
    assert all(str.isprintable(c) for c in lines[-1]) and len(lines[-1]) < 540
    assert out == ""
    began = ("corpus  ", "run  ", "text  ", "model  ", "machine", "training", "warning")
    for line in lines[:-1]:
        assert line.startswith(began), line


def filled(flags: list[str], place: Path, run: Path) -> list[str]:
    return [f.replace("{t}", str(place)).replace("{run}", str(run)) for f in flags]


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    """As users have it: no TRITON_INTERPRET, which these tests otherwise run under."""
    if importlib.util.find_spec("triton"):
        monkeypatch.setattr("minillm.kernels._launch.interpreted", lambda: False)


@pytest.mark.parametrize("flags, code, fragment", TRAIN)
def test_train(train, place, tiny_run, tmp_path, capfd, flags, code, fragment):
    words = filled(flags, place, tiny_run)
    if "--resume" not in words and "--out" not in words:
        words += ["--out", str(tmp_path / "run")]
    check(train(*words), code, fragment, "train.py", capfd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content, ending, fragment", CONFIGS)
def test_config_files(train, tmp_path, capfd, content, ending, fragment):
    path = tmp_path / f"c.{ending}"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code = program.run(
        "train.py", train_script.main, ["--config", str(path), "--out", str(tmp_path / "x")]
    )
    check(code, 2, fragment, "train.py", capfd)


@pytest.mark.parametrize("flags, code, fragment", SAMPLE)
def test_sample(place, tiny_run, capfd, flags, code, fragment):
    words = [str(tiny_run), *filled(flags, place, tiny_run)]
    given = program.run("sample.py", sample.main, words)
    err = capfd.readouterr().err
    lines = err.splitlines(keepends=True)
    if "seed 0, " not in lines[0] and lines[0].startswith(str(tiny_run)):
        lines = lines[1:]  # the model was loaded before the prompt was looked at
    assert given == code and len(lines) == 1, err
    assert lines[0].startswith("sample.py: error: ") and fragment in lines[0]


@pytest.fixture(scope="module")
def char_run(train, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("char") / "run"
    assert train("--out", run, "--tokenizer", "char", "--steps", "2", "--eval-every", "0") == 0
    return run


@pytest.mark.parametrize("character", ["z", "\U0001f642", "\0", "\udcff"])
def test_a_prompt_beyond_the_characters(char_run, capfd, character):
    words = [str(char_run), "--prompt", "the" + character]
    assert program.run("sample.py", sample.main, words) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"sample.py: error: character {character!a} at position 3 is not among")


def test_no_run(tmp_path, place, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for words, fragment in (
        ([], "no run with a checkpoint in runs/; train one with: python train.py"),
        (["none"], "none: no such run"),
        ([str(place)], "is not a run of minillm: it has no config.json"),
        ([str(place / "model.pt")], "pickled checkpoints are never read"),
        (["no\nname\udcff"], r"no name\udcff: no such run"),
        (["a", "b"], "unexpected argument 'b'"),
    ):
        check(program.run("sample.py", sample.main, words), 2, fragment, "sample.py", capfd)


def weights(run: Path) -> Path:
    return run / "checkpoints" / "step-00000008" / "ema-00001-of-00001.safetensors"


def reseal(run: Path) -> None:
    folder = weights(run).parent
    names = [p for p in sorted(folder.iterdir()) if p.name != "manifest.json"]
    files = {p.name: {"bytes": p.stat().st_size, "sha256": storage.file_digest(p)} for p in names}
    storage.write_json(folder / "manifest.json", {"files": files})


def spoil(change):
    """The tensors of the newest checkpoint changed, and everything signed anew."""

    def damage(run: Path, place: Path) -> None:
        save_file(change(load_file(weights(run))), weights(run))
        reseal(run)

    return damage


def pickle_for_tensors(run: Path, place: Path) -> None:
    shutil.copy(place / "model.pt", weights(run))
    reseal(run)


def other_model(run: Path, place: Path) -> None:
    _ = RunFolder(run).model, RunFolder(run).train  # they can be read
    facts = storage.read_json(run / "config.json")
    storage.write_json(run / "config.json", {**facts, "model": {**facts["model"], "d_ff": 8}})


def newer_format(run: Path, place: Path) -> None:
    facts = {**storage.read_json(run / "config.json"), "version": 2}
    storage.write_json(run / "config.json", facts)


def edit_config(**changes):
    def damage(run: Path, place: Path) -> None:
        facts = storage.read_json(run / "config.json")
        storage.write_json(run / "config.json", {**facts, **changes})

    return damage


def no_checkpoint(run: Path, place: Path) -> None:
    shutil.rmtree(run / "checkpoints")


DAMAGE = {
    "NaN weights": (spoil(lambda t: {n: x * torch.nan for n, x in t.items()}), 3, "not finite"),
    "a missing tensor": (spoil(lambda t: dict(list(t.items())[1:])), 3, "lacks "),
    "an extra tensor": (spoil(lambda t: {**t, "x": torch.ones(1)}), 3, "has x, which is unknown"),
    "a wrong shape": (spoil(lambda t: {n: x[..., :3].contiguous() for n, x in t.items()}), 3,
                      "expected ["),
    "a wrong dtype": (spoil(lambda t: {n: x.int() for n, x in t.items()}), 3, "torch.int32"),
    "a pickle for tensors": (pickle_for_tensors, 3, "ema-00001-of-00001.safetensors"),
    "an empty file": (lambda r, p: weights(r).write_bytes(b""), 3, "bytes long"),
    "a flipped bit": (lambda r, p: weights(r).write_bytes(
        weights(r).read_bytes()[:-1] + b"!"), 3, "damaged, its SHA-256 is not the manifest's"),
    "another architecture": (other_model, 3, "config.json: states d_ff 8, step 8 was trained with"),
    "a newer format": (newer_format, 3, "has format version 2, which a newer minillm wrote"),
    "an unknown setting": (edit_config(model={"x": 1}), 3, "unknown model setting 'x'"),
    "no settings": (edit_config(model={}), 3, ""),
    "no configuration": (lambda r, p: (r / "config.json").unlink(), 2, "has no config.json"),
    "a torn configuration": (lambda r, p: (r / "config.json").write_text("{"), 3, "config.json"),
    "no tokenizer": (lambda r, p: (r / "tokenizer.json").unlink(), 3, "has no tokenizer"),
    "another tokenizer": (lambda r, p: (r / "tokenizer.json").write_text(
        '{"version": 1, "kind": "char", "characters": "ab"}'), 3, "is not the tokenizer"),
    "no checkpoint": (no_checkpoint, 2, "holds no checkpoint yet; train on: python train.py"),
}  # fmt: skip


@pytest.mark.parametrize("damage, code, fragment", DAMAGE.values(), ids=DAMAGE)
def test_damaged_runs(tiny_run, place, tmp_path, capfd, damage, code, fragment):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    damage(run, place)
    given = program.run("sample.py", sample.main, [str(run), "--checkpoint", "8"])
    check(given, code, fragment, "sample.py", capfd)


@pytest.mark.parametrize(
    "damage, code, fragment",
    [
        (lambda f: f.write_bytes(b""), 3, "bin"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), 3, "bin"),
        (lambda f: f.write_bytes(b"\x09" + f.read_bytes()[1:]), 3, "is damaged: its sha256"),
        (lambda f: f.unlink(), 3, "bin"),
        (lambda f: (f.parent / "index.json").write_text("{}"), 3, "index.json"),
        (lambda f: (f.parent / "tokenizer.json").unlink(), 3, "tokenizer"),
    ],
)
def test_damaged_corpora(train, tmp_path, capfd, damage, code, fragment):
    cache = tmp_path / "cache"
    assert train("--out", tmp_path / "run", "--cache-dir", cache, "--steps", "1") == 0
    damage(next(cache.glob("*/train-00000.bin")))
    capfd.readouterr()
    given = train("--out", tmp_path / "other", "--cache-dir", cache)
    check(given, code, fragment, "train.py", capfd)
    given = train("--resume", tmp_path / "run", "--steps", "2")
    check(given, code, fragment, "train.py", capfd)


def test_a_resume_on_other_text(train, tmp_path, capfd):
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    text.write_text("the cat sat on a mat. " * 40)
    assert train("--out", tmp_path / "run", "--data", text, "--cache-dir", cache) == 0
    shutil.rmtree(cache)
    text.write_text("the dog ran far. " * 60)
    capfd.readouterr()
    given = train("--resume", tmp_path / "run", "--steps", "9")
    check(given, 2, "a new run with its weights: python train.py --init-from", "train.py", capfd)
    text.unlink()
    shutil.rmtree(cache)
    given = train("--resume", tmp_path / "run", "--steps", "9")
    check(given, 2, "text.txt: no such file or folder", "train.py", capfd)


LATE = [["--tokenizer", "bpe"], ["--val-fraction", "0.2"], ["--errors", "replace"]]


@pytest.mark.parametrize("flags", LATE, ids=lambda words: words[0])
def test_a_prepared_folder_cannot_be_prepared_otherwise(
    train, tiny_run, tmp_path, capfd, monkeypatch, flags
):
    """Not even with the values it was prepared with: the flag would do nothing."""
    folder = str(RunFolder(tiny_run).corpus())
    name = "minillm prepare"
    monkeypatch.setattr(sys, "argv", ["minillm", "prepare", folder, *flags])
    check(verbs.main(), 2, f"{flags[0]}: {folder} is prepared already; leave", name, capfd)
    monkeypatch.setattr(sys, "argv", ["minillm", "prepare", folder, str(tmp_path)])
    check(verbs.main(), 2, f"{folder} is prepared already", name, capfd)
    words = ["--data", folder, "--out", str(tmp_path / "run"), *flags]
    words += [] if "--tokenizer" in flags else ["--tokenizer", "byte"]
    check(train(*words), 2, "is prepared already; leave --", "train.py", capfd)


def test_more_samples_than_memory(tiny_run, monkeypatch, capfd):
    """16 tokens of 2 x 16 floats take 2 KiB a sample."""
    monkeypatch.setattr(device, "available_memory", lambda device: 5 << 11)
    words = [str(tiny_run), "--num-samples", "6", "--max-tokens", "3"]
    assert program.run("sample.py", sample.main, words) == 4
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("sample.py: error: 6 samples need ") and "at most 5 fit" in line
    words[2] = "5"
    assert program.run("sample.py", sample.main, words) == 0


@pytest.mark.parametrize(
    "words, name, fragment",
    [
        ([], "minillm", "which verb? one of: train, sample"),
        (["trian"], "minillm", "unknown verb 'trian'"),
        (["--train"], "minillm", "unknown verb '--train'"),
        (["train", "--stpes", "1"], "minillm train", "did you mean --steps?"),
        (["sample", "none"], "minillm sample", "none: no such run"),
        (["prepare", "none"], "minillm prepare", ""),
    ],
)
def test_verbs(monkeypatch, tmp_path, capfd, words, name, fragment):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minillm", *words])
    check(verbs.main(), 2, fragment, name, capfd)


def test_debug_shows_where(train, capfd):
    assert train("--steps", "2", "--epochs", "1", "--debug") == 2
    assert "Traceback" in capfd.readouterr().err


def test_many_ranks(train, tmp_path, monkeypatch, capfd):
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = "RANK or MASTER_ADDR is not set; start with torchrun --nproc-per-node 2 train.py"
    check(train("--out", tmp_path / "x"), 2, words, "train.py", capfd)


def test_there_are_enough_cases():
    assert len(TRAIN) + len(CONFIGS) + len(SAMPLE) + len(DAMAGE) >= 150
