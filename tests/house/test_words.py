"""Docstrings, comments, help, errors and Markdown are in plain words; words.py has the rules."""

from importlib import import_module

import pytest

from minillm.__main__ import VERBS
from tests.house import words
from tests.house.law import ROOT

# Files whose words are still to be rewritten. Take a file off this list once it is clean.
NOT_YET: frozenset[str] = frozenset()
# Files whose functions are documented elsewhere, each with the reason.
SHARED: dict[str, str] = {}

PYTHON = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("minillm/**/*.py", "kernels/**/*.py", "benchmarks/**/*.py", "data/*.py", "*.py")
    for path in ROOT.glob(pattern)
)
MARKDOWN = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "kernels/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the source tree is not here"
)


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def expected_clean(names: list[str]) -> list:
    """Return the names as parameters of a test; those that are not yet clean are skipped."""
    later = pytest.mark.skip(reason="its words are still to be rewritten")
    return [pytest.param(n, marks=[later] if n in NOT_YET else []) for n in names]


@pytest.mark.parametrize("name", expected_clean(PYTHON))
def test_the_words_of_a_python_file_are_plain(name):
    broken = words.broken_in_python(read(name))
    if name in SHARED:
        broken = [line for line in broken if "no line for" not in line]
    assert broken == []


@pytest.mark.parametrize("name", expected_clean(MARKDOWN))
def test_the_words_of_markdown_are_plain(name):
    assert words.broken_in_text(read(name), "markdown") == []


@pytest.mark.parametrize("verb", expected_clean([f"--help:{verb}" for verb in VERBS]))
def test_the_words_of_help_are_plain(verb):
    parser = import_module(f"minillm.flags.{verb.partition(':')[2]}").parser()
    assert words.broken_in_text(parser.format_help(), "help") == []


def test_the_lists_name_files_that_are_there():
    known = {*PYTHON, *MARKDOWN, *(f"--help:{verb}" for verb in VERBS)}
    assert sorted((NOT_YET | SHARED.keys()) - known) == []
    assert all(SHARED.values())


# A text that breaks a rule, and a part of what is said about it.
PLANTED = [
    ('"""Start anew."""', '"anew"'),
    ('"""Copy both alike."""', '"alike"'),
    ('"""Put it beside the file."""', '"beside"'),
    ('"""Serve whoever comes."""', '"whoever"'),
    ('"""Take whatever comes."""', '"whatever"'),
    ('"""Lock it, so that nobody\\nwrites."""', '"nobody"'),
    ('"""Return so many bytes."""', '"so many"'),
    ('"""Return as many rows."""', '"as many"'),
    ('"""Do what it was told."""', '"told"'),
    ('"""Return the key that tells it."""', '"tells"'),
    ('"""Heed the signal."""', '"Heed"'),
    ('"""Shun tokens."""', '"Shun"'),
    ('"""Keep it until the process lets go of it."""', '"lets go"'),
    ('"""Use the memory at hand."""', '"at hand"'),
    ('"""Return what becomes of a run."""', '"what becomes of"'),
    ('"""Raise if a name is none."""', '"is none"'),
    ('"""Return the run to go on with."""', '"go on with"'),
    ("'''Return a file of one's own.'''", '"of one'),
    ('"""Mend the streams."""', '"Mend"'),
    ('"""Allow it; silence is not suffered."""', '"suffered"'),
    ('"""Send it to a rank that hears."""', '"hears"'),
    ('"""Do no files in this room."""', '"this room"'),
    ('"""Write all the maths of the house."""', '"house"'),
    ('"""Split.\\n\\nWhat this file does not do: write."""', '"What this file does not do"'),
    ('"""What a run has."""', 'begins with "What"'),
    ('"""Of a run: its name."""', 'begins with "Of"'),
    ("'''As Replicated's.'''", 'begins with "As"'),
    ('"""Whether it is there."""', 'begins with "Whether"'),
    ('"""How it was started."""', 'begins with "How"'),
    ('"""Add.\\n\\na: one.    b: two.\\n"""', "two parameters on one line"),
    ('def f(a, b):\n    """Add.\n\n    a: one. b: two\n    """', "two parameters on one line"),
    ('def f(a, b):\n    """Add.\n\n    a: one\n    """', "no line for: b"),
    ('def f(*, a, **b):\n    """Add a: one, b: two."""', "no line for: a, b"),
    ('class A:\n    """It."""\n\n    def f(self, a, b):\n        """Do."""', "A.f: no line for"),
    ("def f(a, b):\n    return a", "f: no docstring"),
    ("x = 1  # as it was told", "comment"),
    ("# Files that\n# nobody reads.", "line 1, comment"),
    ('raise ValueError(f"{x}: start anew")', "error"),
]


@pytest.mark.parametrize("source, message", PLANTED, ids=lambda text: text[:30])
def test_a_planted_fault_is_seen(source, message):
    found = words.broken_in_python(source)
    assert any(message in line for line in found), found


FINE = [
    '"""Return None if there is none; tell the two apart, as it is told apart by name."""',
    '"""Return as many rows as fit, so many that they fill the room on the disk."""',
    '"""Return whether it is there, beside which nothing is."""'.replace("beside", "besides"),
    '"""Return the sum.\n\nalike: names of tensors.  Their dtype is one: fp32.\n"""',
    'def f(a, b):\n    """Add.\n\n    a, b: (N,) fp32\n    """',
    'def f(a):\n    """Return twice a."""',
    "def _f(a, b):\n    return a",
    'class A:\n    """It."""\n\n    def __init__(self, a, b):\n        self.a = a',
    'x = "nobody is told"',
]


@pytest.mark.parametrize("source", FINE, ids=lambda text: text[:30])
def test_plain_words_pass(source):
    assert words.broken_in_python(source) == []


def test_code_in_markdown_is_left_out():
    text = "Use it.\n\n```sh\necho nobody\n```\n\nThe name `whoever` stays."
    assert words.broken_in_text(text, "markdown") == []
    assert words.broken_in_text("| what becomes of it |", "markdown") != []
