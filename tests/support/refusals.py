"""How a command refuses: its exit code, and one line that a person can act on."""

from collections.abc import Callable, Sequence

from minillm.commands import plan, prepare, profile
from minillm.runtime import program
from minillm.scripts import sample, train as train_script

MAINS: dict[str, Callable[[Sequence[str]], None]] = {
    "train.py": train_script.main,
    "sample.py": sample.main,
    "minillm plan": plan.main,
    "minillm prepare": prepare.main,
    "minillm profile": profile.main,
}


def refusal(name: str, words: Sequence[str], code: int, capfd) -> str:
    """The line that `name` refuses `words` with, after a look at its form and the exit code."""
    capfd.readouterr()
    given = program.run(name, MAINS[name], list(words))
    out, err = capfd.readouterr()
    assert given == code, err
    line = one_error(name, err)
    assert out == ""
    return line


def one_error(name: str, err: str) -> str:
    """The last line of standard error; it is the only error, printable and not too long."""
    assert "Traceback" not in err and err.endswith("\n") and err.count(f"{name}: error: ") == 1, err
    line = err.splitlines()[-1]
    assert line.startswith(f"{name}: error: ") and line.isprintable() and len(line) <= 500, line
    return line
