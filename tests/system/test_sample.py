"""sample.py from the command line to standard output; everything else goes to standard error."""

import io
import json
import shutil
import sys

import pytest

from minillm.checkpoint.find import load_run
from minillm.config.sampling import SamplingParams
from minillm.flags import sample as flags
from minillm.inference.generate import generate
from minillm.runtime import program
from minillm.scripts import sample as script


@pytest.fixture
def sample(tiny_run, capsysbinary):
    """sample(*flags) -> what went to standard output, as text, and to standard error."""

    def run(*flags: str) -> tuple[str, str]:
        code = program.run("sample.py", script.main, [str(tiny_run), *flags])
        out, err = (stream.decode() for stream in capsysbinary.readouterr())
        assert code == 0, err
        return out, err

    return run


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_prompt_and_its_continuation(sample, tiny_run):
    out, err = sample("--prompt", "the cat", "--max-tokens", "20", "--seed", "7")
    model, tokenizer, _ = load_run(tiny_run)
    params = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.95, seed=7)
    made = generate(model, [tokenizer.prompt_ids("the cat")], params)
    assert out == "the cat" + tokenizer.decode([t.id for t in made]) + "\n"
    assert "step 8, cpu, eager kernels (on a CPU), 1 thread, seed 7" in err
    assert "20 tokens in" in err


def test_json_has_one_object_a_sample(sample, tiny_run):
    found = objects(sample("--json", "--prompt", "a", "--num-samples", "3", "--max-tokens", "9")[0])
    assert len(found) == 3 and len({x["text"] for x in found}) == 3
    tokenizer = load_run(tiny_run)[1]
    for x in found:
        assert x.keys() == {"prompt", "text", "tokens", "logprobs", "finish", "tokens_per_s"}
        assert x["prompt"] == "a" and x["text"] == tokenizer.decode(x["tokens"])
        assert len(x["tokens"]) == len(x["logprobs"]) == 9 and x["finish"] == "length"
        assert all(p <= 0 for p in x["logprobs"]) and x["tokens_per_s"] > 0


def test_samples_are_shown_one_below_the_other(sample):
    texts = [
        x["text"]
        for x in objects(
            sample("--json", "--prompt", "a", "--num-samples", "3", "--max-tokens", "9")[0]
        )
    ]
    out, _ = sample("--prompt", "a", "--num-samples", "3", "--max-tokens", "9")
    separator = "-" * 20 + "\n"
    assert out == separator.join(f"a{text}\n" for text in texts)


def test_the_seed_makes_the_text(sample):
    flags = ["--json", "--max-tokens", "12"]
    texts = [objects(sample(*flags, "--seed", seed)[0])[0]["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    assert sample("--temperature", "0", "--seed", "1")[0] == sample("--temperature", "0")[0]


def test_a_stop_text_ends_the_sample_before_it(sample):
    free = objects(sample("--json", "--max-tokens", "60")[0])[0]["text"]
    stop = free[20:22]
    for x in (*free[3:5], stop):  # what the text is known to hold
        found = objects(sample("--json", "--max-tokens", "60", "--stop", x, "--stop", "@@")[0])[0]
        assert found["text"] == free[: free.index(x)] and found["finish"] == "stop"
        assert sample("--max-tokens", "60", "--stop", x)[0] == found["text"] + "\n"


def test_interactive_reads_a_prompt_a_line(sample, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\nno end"))
    out, _ = sample("--interactive", "--max-tokens", "5", "--json")
    assert [x["prompt"] for x in objects(out)] == ["the cat", "", "no end"]


def test_interactive_survives_a_prompt_it_cannot_read(sample, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\udcff\nthe cat\n"))
    out, err = sample("--interactive", "--max-tokens", "5", "--json")
    assert [x["prompt"] for x in objects(out)] == ["the cat"]
    assert "error: the text is not valid Unicode: half a character at position 0" in err


def test_a_prompt_from_a_file(sample, tmp_path):
    (tmp_path / "p.txt").write_bytes("one\r\ntwo \u20ac\n".encode())
    found = objects(sample("--json", "--prompt-file", str(tmp_path / "p.txt"))[0])[0]
    assert found["prompt"] == "one\r\ntwo \u20ac\n"


def test_a_prompt_beyond_the_context_is_read_at_its_end_and_said_so(sample):
    out, err = sample("--json", "--prompt", "x" * 30 + "the cat ", "--max-tokens", "30")
    assert "the prompt is 39 tokens long; only its last 8 are read" in err
    assert (
        objects(out)[0]["tokens"]
        == (
            objects(sample("--json", "--prompt", "y" * 30 + "the cat ", "--max-tokens", "30")[0])[0]
        )["tokens"]
    )


GOOD = {
    "no prompt": [],
    "an empty prompt": ["--prompt", ""],
    "emoji": ["--prompt", "\U0001f468\u200d\U0001f469\u200d\U0001f467"],
    "right to left": ["--prompt", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627"],
    "a NUL": ["--prompt", "a\0b"],
    "what looks like a special token": ["--prompt", "<s>hi</s><|endoftext|><unk>"],
    "a dash": ["--prompt=-x"],
    "a tiny temperature": ["--temperature", "1e-30"],
    "a huge temperature": ["--temperature", "1e308"],
    "more than there are": ["--top-k", "100000"],
    "a tiny top-p": ["--top-p", "1e-300"],
    "the likeliest by min-p": ["--min-p", "1"],
    "a huge penalty": ["--repetition-penalty", "100"],
    "a tiny penalty": ["--prompt", "the", "--repetition-penalty", "0.01"],
    "an empty stop": ["--stop", ""],
    "the largest seed": ["--seed", str(2**63 - 1)],
    "nanoGPT's names": ["--start", "x", "--max_new_tokens", "3"],
    "bf16": ["--dtype", "bf16"],
    "the best": ["--checkpoint", "best"],
    "an older one": ["--checkpoint", "4"],
}


@pytest.mark.parametrize("flags", GOOD.values(), ids=GOOD)
def test_unusual_input_that_works(sample, flags):
    words = flags if "--start" in flags else [*flags, "--max-tokens", "20"]
    found = objects(sample("--json", *words)[0])
    prompt = flags[1] if flags and flags[0] in ("--prompt", "--start") else None
    assert found[0]["tokens"] and prompt in (None, found[0]["prompt"])


def test_special_tokens_in_a_prompt_are_plain_text(tiny_run, sample):
    _, tokenizer, _ = load_run(tiny_run)
    assert tokenizer.prompt_ids("<s>") == [256, *b"<s>"]


def test_without_a_run_the_newest_is_taken(tiny_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_run, tmp_path / "runs" / "nano-1")
    monkeypatch.chdir(tmp_path)
    assert program.run("sample.py", script.main, ["--prompt", "def ", "--max-tokens", "9"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("def ") and "nano-1, step 8" in err


@pytest.fixture(scope="module")
def bpe_run(train, tmp_path_factory):
    """A run with tokens such as " cat"; its text has no two spaces in a row."""
    run = tmp_path_factory.mktemp("bpe") / "run"
    flags = ["--tokenizer", "bpe", "--vocab-size", "340", "--steps", "60", "--eval-every", "0"]
    assert train("--out", run, *flags, "--learning-rate", "0.02") == 0
    return run


@pytest.mark.parametrize("prompt", ["the ", "the cat ", "on\nthe "])
@pytest.mark.parametrize("heat", [["--temperature", "0"], ["--temperature", "3", "--top-p", "1"]])
def test_the_space_at_a_prompts_end_is_given_back_to_the_model(bpe_run, capsys, prompt, heat):
    """The first new token begins with it, and it is printed once."""
    tokenizer = load_run(bpe_run)[1]
    flags = ["--prompt", prompt, "--max-tokens", "8", "--num-samples", "8", *heat]
    assert program.run("sample.py", script.main, [str(bpe_run), *flags, "--json"]) == 0
    found = objects(capsys.readouterr().out)
    assert len(found) == 8
    for x in found:
        assert tokenizer.decode(x["tokens"][:1]).startswith(" ")
        assert prompt + x["text"] == prompt[:-1] + tokenizer.decode(x["tokens"])
    if heat[1] == "0":
        assert found[0]["text"] and not found[0]["text"].startswith(" ")
    assert program.run("sample.py", script.main, [str(bpe_run), *flags]) == 0
    shown = capsys.readouterr().out.split("-" * 20 + "\n")
    assert shown == [prompt + x["text"] + "\n" for x in found]


def test_a_prompt_that_needs_no_healing_may_go_on_anyhow(bpe_run, capsys):
    """No longer token begins like a line break: whatever the model likes comes next."""
    flags = ["--prompt", "the cat\n", "--max-tokens", "1", "--num-samples", "8", "--json"]
    assert program.run("sample.py", script.main, [str(bpe_run), *flags]) == 0
    found = objects(capsys.readouterr().out)
    assert not any(x["text"].startswith("\n\n") for x in found)
    assert len({x["text"] for x in found}) > 1


def test_help_says_what_recurrent_decoding_costs_and_promises():
    text = " ".join(flags.parser().format_help().split()).lower()
    for words in (
        "prompts are read at the full recurrence",
        "both cost the coda and the head in every iteration",
        "the same text in fp32, up to rounding in bf16",
        "changes no token (in bf16 up to rounding)",
    ):
        assert words in text, words


def test_the_prompt_is_continued_as_it_was_given(sample):
    """SQL comments and option names look like flags; underscores in them are no dashes."""
    for prompt in ("-- create_table", "--no_copy --yes"):
        out, _ = sample("--prompt", prompt, "--stop", "-- a_b", "--max-tokens", "1", "--json")
        assert json.loads(out)["prompt"] == prompt
