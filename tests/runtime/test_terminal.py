"""Text on its way in and out: UTF-8 under any locale, and no control character on a terminal."""

import ast
import codecs
import io
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minillm import errors
from minillm.distributed.ranks import Ranks
from minillm.flags import prepare as prepare_flags, train as train_flags
from minillm.inference import complete
from minillm.inference.decoding_batch import Token
from minillm.runtime import program, terminal
from minillm.scripts import sample as script
from minillm.training.reporter import Reporter

ROOT = Path(__file__).resolve().parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
WICKED = "\x1b]0;gone\x07\x1b[2J\x9b1m\b\r\x7f \u202eabc\u2066 \ttab\nh\u00e9\U0001f642"
HARMLESS = r"\x1b]0;gone\x07\x1b[2J\x9b1m\x08\r\x7f \u202eabc\u2066" + " \ttab\nh\u00e9\U0001f642"


class Screen:
    """A terminal of which everything that is written to it can be read."""

    def __init__(self) -> None:
        pty = pytest.importorskip("pty")  # not on Windows
        self.master, slave = pty.openpty()
        pytest.importorskip("tty").setraw(slave)  # else the driver writes \r\n for \n
        self.stream = io.TextIOWrapper(io.FileIO(slave, "w"), "utf-8", write_through=True)

    def text(self) -> str:
        self.stream.flush()
        found = b""
        while select.select([self.master], [], [], 0.2)[0]:
            found += os.read(self.master, 1 << 16)
        return found.decode()


@pytest.fixture
def screen():
    made = Screen()
    yield made
    made.stream.close()
    os.close(made.master)


def test_control_characters_are_escaped_on_a_terminal_alone(screen):
    assert terminal.visible(WICKED, io.StringIO()) == WICKED
    assert terminal.visible(WICKED, screen.stream) == HARMLESS
    every = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
    shown = terminal.visible(every, screen.stream)
    assert shown.isascii() and {c for c in shown if not c.isprintable()} == {"\n", "\t"}


def test_what_a_model_writes_cannot_steer_the_terminal(screen, tiny_run, monkeypatch, capsys):
    """Streamed, a character split over two tokens, and samples that follow whole; and in a pipe."""
    ids = list(WICKED.encode())

    def generate(model, prompts, params, mask, stop):
        for n, token in enumerate(ids, 1):
            for row in range(len(prompts)):
                stop(row, ids[:n])
                yield Token(row, token, -1.0)

    monkeypatch.setattr(complete, "generate", generate)
    flags = [str(tiny_run), "--prompt", "\x1b[31m", "--num-samples", "2"]
    assert program.run("sample.py", script.main, flags) == 0
    assert capsys.readouterr().out.count("\x1b[31m" + WICKED) == 2
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen.stream)
        assert program.run("sample.py", script.main, flags) == 0
    shown = screen.text()
    assert shown.count(r"\x1b[31m" + HARMLESS) == 2 and "\x1b" not in shown


@pytest.mark.parametrize("say", ["report", "ranks", "note", "complain"])
def test_other_lines_cannot_either(screen, say, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen.stream)
    if say == "report":
        report = Reporter(tmp_path / "metrics.jsonl", 0, 2, 1.0, 1.0)
        report.close()
        report.say(WICKED)
    elif say == "ranks":
        Ranks().say(WICKED)
    elif say == "note":
        script.say(WICKED)
    else:

        def refuse(argv):
            raise errors.UsageError(WICKED)

        assert program.run("x", refuse, []) == 2
    shown = screen.text()
    assert r"\x1b]0;gone\x07" in shown and "h\u00e9" in shown
    assert not any(c in shown for c in ("\x1b]", "\x07", "\x9b", "\b", "\u202e"))


def test_text_that_the_locale_hid_is_read_as_utf8():
    assert terminal.decoded("h\udcc3\udca9") == "h\u00e9"
    assert terminal.decoded("plain h\u00e9") == "plain h\u00e9"
    for kept in ("caf\udce9", "\ud83d", "\udcc3\udca9\ud800"):
        assert terminal.decoded(kept) == kept
    assert program.one_line("no caf\udcc3\udca9") == "no caf\u00e9"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_streams_write_utf8(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    terminal.use_utf8()
    sys.stdout.write("h\u00e9 \U0001f642 \udcc3\udca9 \udce9 \ud800")
    sys.stdout.flush()
    assert raw.getvalue() == "h\u00e9 \U0001f642 \u00e9 ? ?".encode()


def test_a_terminal_keeps_its_own_encoding(screen, monkeypatch):
    for own, kept in (("latin-1", "latin-1"), ("ascii", "utf-8")):
        screen.stream.reconfigure(encoding=own)
        monkeypatch.setattr(sys, "stdout", screen.stream)
        terminal.use_utf8()
        assert codecs.lookup(screen.stream.encoding) == codecs.lookup(kept)
        print("\U0001f642", file=screen.stream)


def without_encoding(tree: ast.AST) -> Iterator[str]:
    """Calls in a source file that read or write text in the encoding of the locale."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        names = {keyword.arg for keyword in call.keywords}
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        owner = getattr(getattr(call.func, "value", None), "id", "")
        mode = next((a.value for a in call.args if isinstance(a, ast.Constant)), "r")
        member = (
            isinstance(call.func, ast.Attribute)
            and call.args
            and (not isinstance(call.args[0], ast.Constant))
        )  # of an archive, which is opened by name and as bytes
        text = {
            "open": not member and owner != "os" and "b" not in str(mode) and len(call.args) < 3,
            "read_text": not call.args,
            "write_text": len(call.args) < 2,
        }
        launches = name in ("run", "Popen", "check_output", "check_call")
        as_text = launches and {"text", "universal_newlines"} & names
        if "encoding" not in names and (text.get(name) or as_text):
            yield f"line {call.lineno}: {ast.unparse(call)[:80]}"


def test_no_file_is_opened_in_the_encoding_of_the_locale():
    found = {}
    for path in ROOT.rglob("*.py"):
        if not {"tests", ".venv", "build"} & set(path.relative_to(ROOT).parts):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if wrong := list(without_encoding(tree)):
                found[str(path.relative_to(ROOT))] = wrong
    assert found == {}
    bad = "open('a')\np.open('w')\np.read_text()\np.write_text('x')\nrun(['git'], text=True)"
    assert len(list(without_encoding(ast.parse(bad)))) == 5


@pytest.mark.parametrize("way", [
    "--interactive",
    pytest.param("--prompt", marks=pytest.mark.slow),
    pytest.param("--prompt-file", marks=pytest.mark.slow),
])  # fmt: skip
def test_ascii_forced_on_python_changes_no_text(tiny_run, tmp_path, way):
    """A prompt, a prompt file, lines of standard input, a stop text and a run's name."""
    run, file, prompt = tmp_path / "caf\u00e9", tmp_path / "pr\u00e9.txt", "h\u00e9 \U0001f642"
    run.symlink_to(tiny_run)
    file.write_text(prompt, encoding="utf-8")
    value = {"--prompt": [prompt], "--prompt-file": [file]}.get(way, [])
    flags = ["--max-tokens", "3", "--json", "--stop", "\u00e9\u00e9", way, *value]
    done = subprocess.run(
        [sys.executable, "-m", "minillm", "sample", run, *flags], input=prompt.encode() + b"\n",
        capture_output=True, timeout=300, env={**os.environ, **ASCII, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == prompt
    assert "caf\u00e9, step 8".encode() in done.stderr


@pytest.mark.parametrize("flag", ["--sample-prompt", "--text-column"])
def test_text_of_the_command_line_is_utf8_where_python_is_told_ascii(flag):
    """It is neither a path nor a name that the system knows, so no byte of it has to be kept."""
    as_python_keeps_it = "caf\u00e9".encode().decode("ascii", "surrogateescape")
    for flags in (train_flags, prepare_flags):
        if flag in flags.parser()._option_string_actions:
            given = vars(flags.parse([flag, as_python_keeps_it]))
            assert given[flag[2:].replace("-", "_")] == "caf\u00e9"


@pytest.mark.slow
def test_ascii_forced_on_python_trains_and_plans(tmp_path):
    """With paths that are no ASCII, and a refusal that names one."""
    text = tmp_path / "\u00e9.txt"
    text.write_text("caf\u00e9 na\u00efve \U0001f642\n" * 300, encoding="utf-8")
    environment = {**os.environ, **ASCII, "OMP_NUM_THREADS": "1"}
    tiny = "--threads 1 --n-layer 1 --n-head 2 --d-model 32 --seq-len 32 --batch-size 4 --steps 5"
    prompt = ["--sample-prompt", "na\u00ef"]
    commands = (
        (
            ["-m", "minillm", "train", "--data", text, "--out", "r\u00e9", *tiny.split(), *prompt],
            0,
            "r\u00e9",
        ),
        (["-m", "minillm", "train", "--resume", "r\u00e9", "--steps", "7"], 0, "r\u00e9: step 7"),
        (["-m", "minillm", "prepare", "n\u00e9ant.txt"], 2, "n\u00e9ant.txt: no such file"),
        (["-m", "minillm", "plan", "--data", "n\u00e9ant.txt"], 2, "n\u00e9ant.txt"),
    )
    for command, code, fragment in commands:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, cwd=tmp_path, timeout=300,
            env={**environment, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert fragment in done.stderr.decode() + done.stdout.decode()
    assert (tmp_path / "r\u00e9" / "config.json").is_file()
