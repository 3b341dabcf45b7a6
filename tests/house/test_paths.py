"""Every Python file that a text names is there: in Markdown and in docstrings."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import PurePosixPath

import pytest

from tests.house.law import ROOT

# A name in capitals stands for any: minillm/flags/COMMAND.py. A star is a pattern.
NAMED = re.compile(r"(?<![\w/.*-])(?:[\w-]+/)*[\w*-]+\.py\b")
PLACEHOLDER = re.compile(r"(^|/)[A-Z_]+\.py$")
# Files of other projects, by the last part of their path.
FOREIGN = frozenset(("raven_modeling_minimal.py", "raven_config_minimal.py"))
MARKDOWN = ("README.md", "CONTRIBUTING.md", "kernels/*.md", "benchmarks/**/*.md")
PYTHON = tuple(
    "minillm/**/*.py kernels/**/*.py benchmarks/**/*.py tests/**/*.py data/*.py *.py".split()
)

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the source tree is not here"
)


def texts(patterns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every file that one of the patterns describes."""
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")


@cache
def python_files() -> tuple[PurePosixPath, ...]:
    """Return the paths of all Python files of the tree."""
    return tuple(PurePosixPath(name) for name, _ in texts(PYTHON))


def missing(text: str) -> list[str]:
    """Return the Python files that a text names and that are not in the tree.

    A path may leave out its first folders, as in `optim/build.py`, or all, as in `build.py`.
    """
    names = {n for n in NAMED.findall(text) if not PLACEHOLDER.search(n)}
    return sorted(
        name
        for name in names
        if name.rpartition("/")[2] not in FOREIGN
        and not any(path.match(name) for path in python_files())
    )


def missing_in_docstrings(source: str) -> list[str]:
    """Return the Python files that the docstrings of a file name and that are not there."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, owners))
    return sorted({name for node in nodes for name in missing(ast.get_docstring(node) or "")})


def test_files_that_markdown_names_are_there():
    found = {name: missing(text) for name, text in texts(MARKDOWN)}
    assert {name: gone for name, gone in found.items() if gone} == {}


def test_files_that_docstrings_name_are_there():
    found = {name: missing_in_docstrings(text) for name, text in texts(PYTHON)}
    assert {name: gone for name, gone in found.items() if gone} == {}


def test_a_planted_stale_name_is_seen():
    gone = "See `tests/training/test_watch.py`, minillm/world.py, optim/builder.py and meter.py."
    assert missing(gone) == [
        "meter.py", "minillm/world.py", "optim/builder.py", "tests/training/test_watch.py",
    ]  # fmt: skip
    assert missing_in_docstrings('def f():\n    """Do as world.py does."""') == ["world.py"]


def test_names_of_files_pass():
    assert missing("`tests/house/law.py`, optim/build.py, build.py, tests/test_bad_*.py") == [
        "tests/test_bad_*.py"  # these lie in tests/system
    ]
    assert missing("minillm/flags/NAME.py, recpre/raven_config_minimal.py, tests/house/*.py") == []
