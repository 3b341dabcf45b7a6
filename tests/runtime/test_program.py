"""Every refusal is one line and its exit code; every bug of ours keeps its traceback."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st

from minillm import errors
from minillm.errors import UsageError, parameter
from minillm.runtime.program import one_line, run


def raising(error):
    def body(argv):
        raise error

    return body


def out_of_cpu_memory(argv):
    torch.zeros(1 << 50)


ANSWERS = [
    (raising(errors.UsageError("no such flag")), 2, "x.py: error: no such flag\n"),
    (raising(errors.CorruptError("a.bin: torn")), 3, "x.py: error: a.bin: torn\n"),
    (raising(errors.UnavailableError("no GPU")), 4, "x.py: error: no GPU\n"),
    (raising(errors.DivergedError("loss is nan")), 6, "x.py: error: loss is nan\n"),
    (
        raising(PermissionError(13, "Permission denied", "/a/b")),
        5,
        "x.py: error: /a/b: Permission denied\n",
    ),
    (
        raising(OSError(28, "No space left on device", b"/a/b\xff")),
        5,
        "x.py: error: /a/b\\udcff: No space left on device\n",
    ),
    (raising(OSError(9, "Bad file descriptor", 7)), 5, "x.py: error: 7: Bad file descriptor\n"),
    (raising(OSError("strange")), 5, "x.py: error: strange\n"),
    (raising(KeyboardInterrupt()), 130, "\nx.py: interrupted\n"),
    (raising(SystemExit(0)), 0, ""),
    (raising(SystemExit()), 0, ""),
    (raising(SystemExit(3)), 3, ""),
    (lambda argv: None, 0, ""),
]


@pytest.mark.parametrize("body, code, text", ANSWERS)
def test_exit_codes_and_messages(capsys, body, code, text):
    assert run("x.py", body, []) == code
    streams = capsys.readouterr()
    assert streams.err == text
    assert streams.out == ""


@pytest.mark.parametrize("body", [out_of_cpu_memory, raising(MemoryError())])
def test_lack_of_memory_is_the_environments(capsys, body):
    assert run("x.py", body, []) == 4
    message = capsys.readouterr().err
    assert message.startswith("x.py: error: out of memory; ")
    assert "--micro-batch-size" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("oops"), RuntimeError("oops"), AssertionError()])
def test_our_bugs_show_where(capsys, error):
    assert run("x.py", raising(error), []) == 1
    message = capsys.readouterr().err
    assert message.startswith("x.py: this is a bug in minillm; please report what follows\n")
    assert "Traceback" in message and type(error).__name__ in message


def test_debug_shows_the_traceback_of_a_refusal(capsys):
    assert run("x.py", raising(errors.UsageError("no such flag")), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_usage_error_is_a_value_error():
    assert issubclass(errors.UsageError, ValueError)


@given(st.text())
def test_a_message_is_one_printable_line(text):
    line = one_line(text)
    assert line.isprintable() and len(line) <= 300
    if text.isprintable() and len(text) <= 300:
        assert line == text


def test_a_long_message_loses_its_middle():
    line = one_line("no such file " + "x" * 300 + "; name another")
    assert len(line) == 300 and line.startswith("no such file xx") and line.endswith("name another")
    assert one_line("x" * 300) == "x" * 300
    assert one_line("two\nlines\x1b[31m\udcff") == "two lines\\x1b[31m\\udcff"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no SIGPIPE and no SIGINT")
def test_a_reader_that_goes_away_is_no_error():
    program = (
        "import sys; from minillm.runtime import program; sys.exit(program.run('x', BODY, []))"
    )
    body = "lambda argv: [print('y' * 100, flush=True) for _ in range(100000)]"
    process = subprocess.Popen(
        [sys.executable, "-c", program.replace("BODY", body)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 128 + signal.SIGPIPE
    process.stderr.close()


def test_an_error_names_a_parameter_in_python_and_a_flag_on_the_command_line(capfd):
    def body(argv):
        raise UsageError(f"{parameter('top_k')} -1: expected 0 or more; see {parameter('seed')}")

    with pytest.raises(UsageError, match=r"^top_k -1: expected 0 or more; see seed$"):
        body([])
    assert run("sample.py", body, []) == 2
    line = "sample.py: error: --top-k -1: expected 0 or more; see --seed\n"
    assert capfd.readouterr().err == line


def test_no_mark_of_a_parameter_is_seen_in_python():
    error = UsageError(f"{parameter('top_k')} -1: expected 0 or more")
    again = copy.copy(error)
    for one in (error, again):
        assert repr(one) == "UsageError('top_k -1: expected 0 or more')" and one.args == (str(one),)
        assert one.with_flags() == "--top-k -1: expected 0 or more"
