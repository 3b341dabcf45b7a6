"""The names that programs import, and what they do: shared/design/interface.md, "From Python"."""

import ast
import math
import pydoc
import statistics
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch

import minillm
from minillm.config.flags import ALIASES, setting_fields
from minillm.config.resolve import RECURRENCE
from minillm.errors import CorruptError, UsageError
from minillm.flags import sample as sample_flags, train as train_flags
from minillm.flags.keywords import train_arguments
from minillm.inference import language_model
from minillm.ops import select
from minillm.scripts import sample as sample_script
from minillm.training import samples

ROOT = Path(minillm.__file__).resolve().parents[1]
NAMES = {"GPT", "ModelConfig", "PRESETS", "SamplingParams", "TrainConfig", "ZeroOptimizer", "load"}
HEAVY = ("torch", "numpy", "sentencepiece", "triton", "safetensors")


@pytest.fixture(scope="module")
def lm(tiny_run):
    return minillm.load(tiny_run, device="cpu")


def in_a_new_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_is_quick_and_takes_nothing_heavy_along():
    """2 ms of processor time on a quiet machine; the limit leaves room for a busy one."""
    code = (
        "import sys, time; before = time.process_time(); import minillm, minillm.errors;"
        f"print(time.process_time() - before, sorted(set({HEAVY!r}) & sys.modules.keys()))"
    )
    answers = [in_a_new_process(code).split(maxsplit=1) for _ in range(5)]
    assert {heavy for _, heavy in answers} == {"[]"}
    assert statistics.median(float(seconds) for seconds, _ in answers) < 0.1


def test_type_checkers_see_the_names_that_are_imported_lazily():
    tree = ast.parse(Path(minillm.__file__).read_text("utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and "TYPE" in ast.unparse(n.test))
    seen = {
        alias.asname: node.module
        for node in block.body if isinstance(node, ast.ImportFrom) and node.module != "pathlib"
        for alias in node.names if alias.asname == alias.name
    }  # fmt: skip
    assert seen == minillm.HOMES and seen.keys() == NAMES
    for name, home in minillm.HOMES.items():
        assert getattr(minillm, name) is getattr(import_module(home), name)
    assert (Path(minillm.__file__).parent / "py.typed").is_file()


def test_the_names_are_listed_and_others_are_refused():
    assert {*NAMES, "train", "__version__"} <= set(dir(minillm))
    assert {name for name in dir(minillm) if name[0] != "_"} >= NAMES
    with pytest.raises(AttributeError, match="'minillm' has no attribute 'lode'"):
        minillm.lode  # noqa: B018
    assert in_a_new_process("from minillm import GPT; print(GPT.__module__)") == "minillm.model.gpt"


def test_help_shows_six_lines_of_use_and_a_sentence_for_each_wing():
    text = pydoc.plain(pydoc.render_doc(minillm))
    lines = minillm.__doc__.split("\n\n")[1].splitlines()
    assert len(lines) == 6 and all(line.strip() in text for line in lines)
    wings = {p.parent.name for p in (ROOT / "minillm").glob("*/__init__.py")}
    wings |= {"errors", "kernels", "ops"}
    described = [line.split()[0] for line in minillm.__doc__.split("\n\n")[3].splitlines()]
    assert set(described) == wings and len(described) == len(wings)


def test_configurations_are_frozen_and_presets_are_settings_of_theirs():
    made = (minillm.ModelConfig(), minillm.TrainConfig(), minillm.SamplingParams())
    for each, name in zip(made, ("n_layer", "seed", "top_k"), strict=True):
        assert is_dataclass(each)
        with pytest.raises(FrozenInstanceError):
            setattr(each, name, 1)
    known = {f.name for config in made[:2] for f in fields(config)}
    assert {"nano", "tiny", "small", "medium", "large"} <= minillm.PRESETS.keys()
    assert all(preset.keys() <= known for preset in minillm.PRESETS.values())


def test_a_model_is_called_for_logits_or_a_loss():
    config = minillm.ModelConfig(vocab_size=11, seq_len=8, n_layer=1, n_head=2, d_model=16)
    model = minillm.GPT(config, select("auto", torch.device("cpu")))
    tokens = torch.arange(10).view(2, 5)
    logits = model(tokens)
    loss = model(tokens, tokens)
    assert logits.shape == (2, 5, 11) and loss.shape == ()
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    )


def test_a_run_is_loaded_with_its_parts(lm, tiny_run):
    assert isinstance(lm.model, minillm.GPT) and isinstance(lm.config, minillm.ModelConfig)
    assert lm.tokenizer.encode("a") == [97] and lm.step == 8
    assert minillm.load(str(tiny_run), checkpoint=4, dtype="bf16").model.dtype is torch.bfloat16
    assert "step=8" in repr(lm) and len(repr(lm)) < 1000


@pytest.mark.parametrize("wish, limit, threads", [
    ("auto", None, 1), ("auto", 0, 7), (2, None, 2), ("2", None, 2), (2, 0, 2),
])  # fmt: skip
def test_load_sets_the_number_of_threads(tiny_run, monkeypatch, wish, limit, threads):
    """A small model gets one thread; for others set_threads decides."""
    if limit is not None:
        monkeypatch.setattr(language_model, "ONE_THREAD_BELOW", limit)
    monkeypatch.setattr(
        language_model, "set_threads", lambda wish: chosen.append(7 if wish == "auto" else wish)
    )
    chosen = []
    minillm.load(tiny_run, device="cpu", threads=wish)
    assert [int(n) for n in chosen] == [threads]


def test_sample_leaves_the_threads_to_load(tiny_run, capsys):
    before = torch.get_num_threads()
    try:
        for flags, said in (((), "1 thread,"), (("--threads", "2"), "2 threads,")):
            sample_script.main([str(tiny_run), "--max-tokens", "1", *flags])
            assert said in capsys.readouterr().err
    finally:
        torch.set_num_threads(before)
    assert not hasattr(sample_script, "ONE_THREAD_BELOW")


def test_text_in_gives_text_and_a_list_gives_a_list(lm):
    one = lm.generate("the cat", max_tokens=12, seed=3)
    assert isinstance(one, str) and len(one.encode()) >= 12 and not one.startswith("the cat")
    both = lm.generate(["the cat", "on", ""], max_tokens=12, seed=3)
    assert both[0] == one and len(both) == 3 and lm.generate([]) == []
    assert lm.generate("the cat", max_tokens=12, seed=4) != one


def test_a_stream_gives_the_same_text_in_pieces(lm):
    pieces = list(lm.stream("the cat", max_tokens=12, seed=3))
    assert len(pieces) > 1 and all(pieces)
    assert "".join(pieces) == lm.generate("the cat", max_tokens=12, seed=3)


def test_a_stop_text_ends_the_text_before_it(lm):
    whole = lm.generate("", max_tokens=40, seed=3)
    for stop in (whole[9:11], [whole[9:11], "@@"]):
        assert (
            lm.generate("", max_tokens=40, seed=3, stop=stop) == whole[: whole.index(whole[9:11])]
        )


@pytest.mark.parametrize(
    "sampling, words",
    [
        ({"temprature": 1.0}, "temprature: no such sampling parameter; did you mean temperature?"),
        ({"wibble": 1}, "wibble: no such sampling parameter; one of: max_tokens, "),
        ({"temperature": -1}, "temperature -1 .*expected at least 0"),
        ({"top_p": 0}, "top_p 0: expected above 0"),
        ({"max_tokens": "9"}, "max_tokens '9' is a str, expected int"),
        ({"stop": 3.5}, "stop 3.5: expected a text"),
        ({"stop": ["a", 1]}, "stop 1: expected a text"),
        ({"recurrence": 3}, "^recurrence: this model has no core"),
    ],
)
def test_errors_name_parameters(lm, sampling, words):
    for act in (lm.generate, lm.stream):
        with pytest.raises(UsageError, match=words) as refused:
            act("the", **sampling)
        assert "--" not in str(refused.value) and "\n" not in str(refused.value)


def test_wrong_runs_devices_and_types_are_refused(tiny_run, tmp_path):
    for path, options, words in (
        (tmp_path / "none", {}, "none"),
        (tiny_run, {"checkpoint": 5}, "checkpoint 5: .* holds steps 4, 8"),
        (tiny_run, {"dtype": "fp8"}, "dtype 'fp8' is not one of auto, fp32"),
        (tiny_run, {"device": "tpu"}, "device 'tpu' is not one of"),
        (tiny_run, {"threads": 0}, "threads: 0 is out of range; .* or auto"),
        (tiny_run, {"threads": "all"}, "threads: 'all' is not a whole number, or auto"),
        (tiny_run, {"threads": 1.5}, "threads: '1.5' is not a whole number, or auto"),
        (3, {}, "path: expected a path, got int"),
    ):
        with pytest.raises((UsageError, CorruptError), match=words):
            minillm.load(path, **options)


def test_a_prompt_beyond_the_context_is_said(lm):
    with pytest.warns(UserWarning, match="the prompt is .* tokens long; only its last 8 are read"):
        lm.generate("x" * 30, max_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.generate("x", max_tokens=1)


def test_the_flags_of_sample_are_the_fields_of_sampling_params():
    args = sample_flags.parser().parse([])
    for f in fields(minillm.SamplingParams):
        value = getattr(args, f.name)
        assert (() if value is None and f.name == "stop" else value) == f.default, f.name
    assert sample_flags.sampling_of(args) == minillm.SamplingParams()


def test_a_text_is_scored_and_a_list_of_texts(lm):
    one, texts = lm.score("the cat"), ["the cat", "x" * 70]
    assert one.tokens == lm.tokenizer.encode("the cat") and len(one.logprobs) == 7
    assert one.nats == pytest.approx(-sum(one.logprobs))
    assert one.bits_per_byte == pytest.approx(one.nats / math.log(2) / 7)
    assert [score.tokens for score in lm.score(texts)] == [list(t.encode()) for t in texts]
    assert lm.score([]) == []
    with pytest.raises(UsageError, match="^recurrence: this model has no core"):
        lm.score("a", recurrence=3)


@pytest.mark.parametrize("method, name", [
    ("generate", "prompt"), ("score", "text"), ("stream", "prompt"),
])  # fmt: skip
def test_what_is_no_text_is_refused_by_name(lm, method, name):
    one = "" if method == "stream" else " or a list of texts"
    listed = "prompt: expected a text, got list" if not one else rf"{name}\[1\]: .* text, got int"
    for value, words in (
        (3, f"{name}: expected a text{one}, got int"),
        (None, f"{name}: expected a text{one}, got NoneType"),
        (b"ab", f"{name}: expected a text{one}, got bytes"),
        (["a", 3], listed),
    ):
        with pytest.raises(UsageError, match=f"^{words}$"):
            getattr(lm, method)(value)


def test_docstrings_name_the_errors_and_the_number_formats():
    lm = language_model.LanguageModel
    for function in (lm.generate, lm.stream):
        assert all(f"{e}Error" in function.__doc__ for e in ("Usage", "Diverged", "Unavailable"))
    described = [minillm.load.__doc__, sample_flags.parser().format_help()]
    for text in (" ".join(text.split()) for text in described):
        assert "fp16 on one older than Ampere" in text and "fp32 on a CPU and on mps" in text
    assert "minillm.training.watchdog.Stopped" in minillm.train.__doc__
    assert issubclass(import_module("minillm.training.watchdog").Stopped, Exception)
    batch = import_module("minillm.inference.decoding_batch").DecodingBatch
    assert "reaches seq_len" not in batch.__doc__ and "more than seq_len" in batch.__doc__


def test_the_length_of_a_sample_has_one_default():
    path = ROOT / "minillm" / "training" / "samples.py"
    body = ast.parse(path.read_text("utf-8")).body
    values = {ast.unparse(n.targets[0]): n.value for n in body if isinstance(n, ast.Assign)}
    assert not isinstance(values["SAMPLE_TOKENS"], ast.Constant)
    assert samples.SAMPLE_TOKENS == minillm.SamplingParams().max_tokens == 200


def test_training_gives_a_run_that_can_be_loaded(tmp_path):
    text = tmp_path / "my.txt"
    text.write_text("the cat sat on a mat\n" * 400)
    run = minillm.train(
        data=text, preset="nano",
        out=tmp_path / "run", cache_dir=tmp_path / "cache", tokenizer="byte", steps=3,
        n_layer=1, d_model=16, n_head=2, seq_len=16, batch_size=2, device="cpu", threads="1",
        compile=False, time_limit=None, learning_rate=1e-3,
    )  # fmt: skip
    assert run == tmp_path / "run" and minillm.load(run).step == 3
    assert minillm.train(resume=run, steps=4, device="cpu") == run
    assert minillm.load(run).step == 4


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"stpes": 3}, "stpes: no such setting; did you mean steps?"),
        ({"wibble": 3}, "wibble: no such setting; see"),
        ({"n_layer": "4"}, "n_layer '4' is a str, expected int"),
        ({"n_layer": 0}, "n_layer 0 is out of range"),
        ({"time_limit": "soon"}, "time_limit: 'soon' is not a duration"),
        ({"time_limit": -5}, "time_limit: '-5' is not a duration"),
        ({"time_limit": True}, "time_limit True is a bool, expected float"),
        ({"recurrent": (1, 2)}, "recurrent: '1,2' is not PRELUDE,CORE,CODA"),
        ({"recurrent": 3}, "recurrent: '3' is not PRELUDE,CORE,CODA"),
        ({"threads": 0}, "threads: 0 is out of range"),
        ({"threads": 2.5}, "threads 2.5 is a float, expected str"),
        ({"micro_batch_size": True}, "micro_batch_size True is a bool, expected str"),
        ({"sample_prompt": 3}, "sample_prompt 3 is a int, expected str"),
        ({"device": 3}, "device 3 is a int, expected str"),
        ({"data": 3}, "data: expected a path, got int"),
        ({"data": ["a", 3]}, "data: expected a path, got int"),
        ({"out": 3}, "out: expected a path, got int"),
        ({"resume": 3}, "resume: expected a path, got int"),
        ({"config": ["a"]}, "config: expected a path, got list"),
        ({"lr": "1"}, "learning_rate '1' is a str, expected float"),
        ({"lr": 1e-3, "learning_rate": 1e-3}, "lr and learning_rate are one setting; give one"),
        ({"max_itres": 3}, "max_itres: no such setting; did you mean max_iters?"),
        ({"preset": "huge"}, "huge"),
        ({"data": "no.txt"}, "no.txt: no such file"),
        ({"resume": "no-run"}, "no-run: no such run"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(UsageError, match=words) as refused:
        minillm.train(**settings)
    assert "\n" not in str(refused.value)


HERE = Path(__file__)
TYPED = {  # setting -> a value with the type that Python code would give it
    "activation_checkpointing": True, "backprop_depth": 2, "batch_size": 8, "beta1": 0.9,
    "beta2": 0.99, "bias": True, "cache_dir": Path("cache"), "compile": False,
    "config": HERE.with_name("none.toml"), "d_ff": 64, "d_head": 8, "d_model": 64,
    "data": [HERE, HERE.parent], "decay_fraction": 0.1, "device": "cpu", "document_mask": True,
    "dropout": 0.1, "dtype": "fp32", "early_stop": 2, "ema": 0.99, "encoding": "cp1252",
    "epochs": 2, "errors": "replace", "eval_batches": 3, "eval_every": 10,
    "final_eval_batches": 3, "grad_clip": 1, "hang_timeout": 60, "init": "gpt2",
    "init_from": HERE, "injection": "add", "keep_best": False, "keep_last": 1, "kernels": "eager",
    "learning_rate": 1e-3, "log_every": 1, "logit_softcap": 30, "max_recurrence": 16,
    "mean_recurrence": 4, "micro_batch_size": 4, "min_learning_rate": 1e-5, "mlp": "gelu",
    "n_head": 2, "n_kv_head": 1, "n_layer": 2, "norm": "layernorm", "norm_eps": 1e-5,
    "offload": True, "optimizer": "muon", "out": Path("~/run"), "overwrite": True,
    "position": "alibi", "preset": "nano", "qk_bias": True, "qk_norm": True, "rank_timeout": 60,
    "recurrence_curriculum": True, "recurrence_groups": 2, "recurrence_style": "parcae",
    "recurrent": (1, 2, 1), "resume": HERE, "rope_base": 500, "sample_every": 5,
    "sample_prompt": "the", "save_every": 5, "schedule": "wsd", "seed": 3, "seq_len": 32,
    "start_state": "zero", "steps": 5, "text_column": "body", "threads": 2,
    "tie_embeddings": True, "time_limit": 60, "tokenizer": HERE, "val": (HERE,),
    "val_fraction": 0.1, "vocab_size": 300, "warmup": 2, "weight_decay": 0, "window": 16,
    "zero": 1,
}  # fmt: skip
PARTNERS = {
    "offload": {"zero": 1}, "min_learning_rate": {"learning_rate": 1e-3},
    **dict.fromkeys(RECURRENCE, {"recurrent": [1, 1, 1]}),
}  # fmt: skip


def words_of(name: str, value: object) -> list[str]:
    """The setting as words of a command line."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag, str(value).lower()]
    if isinstance(value, list | tuple) and isinstance(value[0], int):
        return [flag, ",".join(map(str, value))]
    return [flag, *map(str, value if isinstance(value, list | tuple) else [value])]


@pytest.mark.parametrize("name", [*setting_fields(), "config", "resume"])
def test_a_typed_value_is_what_its_text_is_on_the_command_line(name, tmp_path):
    value = TYPED[name]
    if name == "config":
        (value := tmp_path / "a.toml").write_text("steps = 3\n")
    settings = {name: value, **PARTNERS.get(name, {})}
    args = vars(train_flags.parse([w for pair in settings.items() for w in words_of(*pair)]))
    assert vars(train_arguments(settings)) == {
        n: args[n] for n in (*setting_fields(), "config", "resume")
    }
    assert args[name] is not None


def test_the_aliases_of_flags_are_keywords():
    for alias, flag in ALIASES.items():
        name, meant = (word[2:].replace("-", "_") for word in (alias, flag))
        settings = {"learning_rate": 1e-3} if name == "min_lr" else {}
        found = train_arguments({name: TYPED[meant], **settings})
        assert found == train_arguments({meant: TYPED[meant], **settings}), alias


def test_every_flag_of_training_is_a_keyword(tmp_path):
    args = train_arguments({"time_limit": "10m", "data": [ROOT / "setup.py"], "out": "~/x"})
    assert args.time_limit == 600 and args.data == [str(ROOT / "setup.py")]
    assert args.out == str(Path("~/x").expanduser())
    assert vars(args).keys() == {*setting_fields(), "config", "resume"}


def test_a_star_import_brings_the_public_names_and_no_others():
    code = "from minillm import *; print(sorted(n for n in dir() if not n.startswith('__')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == str(sorted(minillm.__all__)), done.stderr
    assert set(minillm.__all__) == {*minillm.HOMES, "train"}
