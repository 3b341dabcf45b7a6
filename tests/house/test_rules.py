"""The rules for every source file: nothing happens at import, no globals, docstrings, 300 lines."""

import ast
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.house.law import ROOT, files_of, full_name, imported, names_of, wing_of

MAX_LINES = 300
ENVIRONMENT = "minillm.runtime.launch"  # the one file that reads the environment
ENVIRONMENT_NAMES = ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv")
IMPORTERS = (
    "importlib.import_module", "importlib.__import__", "builtins.__import__", "__import__",
)  # fmt: skip
VAGUE = frozenset("utils util helpers helper misc common stuff".split())  # names of no file
# Calls and decorators that may stand outside functions: they make a value and do nothing else.
FACTORIES = frozenset(
    "bytes frozenset getattr hasattr object range str tuple classmethod property staticmethod"
    " collections.namedtuple contextlib.contextmanager dataclasses.dataclass dataclasses.field"
    " dataclasses.fields datetime.timedelta functools.cache functools.cached_property"
    " functools.partial numpy.dtype pathlib.Path re.compile threading.RLock torch.finfo"
    " torch.inference_mode torch.library.Library torch.library.custom_op torch.no_grad triton.jit"
    " triton.language.constexpr types.MappingProxyType typing.NewType typing.TypeVar"
    " typing.overload".split()
)
# The same for functions of the project, then for its records.
OWN_FACTORIES = frozenset(
    "differentiable entrance last parameter setting _dense _eager _entry _is_count _is_number"
    " _number _or_none _reference _rules _saved _sizes_on_gpu _usual"
    " Arch Card Column Entry InjectionKind Kind NormKind OptimizerKind PositionKind Ranks".split()
)
METHODS = frozenset(
    "split items get resolve is_file is_dir setter register_autograd register_fake".split()
)
PICKLES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the source tree is not here"
)


def about_libraries(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield one line for every library that this file must not import."""
    wing = wing_of(module)
    plain = module.startswith(("minillm.kernels.reference", "minillm.kernels.eager"))
    for dotted in imported(tree):
        top = dotted.split(".")[0]
        if top == "triton" and (plain or wing not in ("kernels", "profiling")):
            yield f"{module} imports triton"
        if top in PICKLES:
            yield f"{module} imports {top}"
        if dotted in ENVIRONMENT_NAMES and module != ENVIRONMENT:
            yield f"{module} reads the environment"


def about_calls(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield one line for every global, and every name that no file may use."""
    names = names_of(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{module} has a global: {', '.join(node.names)}"
        if isinstance(node, ast.expr) and (name := full_name(node, names)):
            yield from about_name(module, name, id(node) in called)


def about_name(module: str, name: str, is_called: bool) -> Iterator[str]:
    """Yield one line if a file must not use a name, such as os.environ or torch.load."""
    first_two = ".".join(name.split(".")[:2])
    if first_two in ENVIRONMENT_NAMES and module != ENVIRONMENT:
        yield f"{module} reads the environment"
    if first_two in ("torch.save", "torch.load"):
        yield f"{module} uses {first_two}"
    if first_two == "torch.distributed" and wing_of(module) != "distributed":
        yield f"{module} uses torch.distributed"
    if is_called and name in ("builtins.eval", "builtins.exec", "builtins.compile"):
        yield f"{module} calls {name.removeprefix('builtins.')}()"
    if is_called and name in ("open", "builtins.open") and wing_of(module) == "model":
        yield f"{module} opens a file"
    if name in IMPORTERS and module not in ("minillm.__main__", "minillm"):
        yield f"{module} imports by name; only __main__ does"


def about_the_module(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield one line if the file has no docstring, and for all that it does when imported."""
    allowed = (
        ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    )
    if VAGUE & set(module.split(".")):
        yield f"{module}: the name of a file says what is in it"
    if not ast.get_docstring(tree):
        yield f"{module} has no docstring"
    names = names_of(tree)
    for node in tree.body[1:]:
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        is_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        # Part of an operator's definition.
        is_backward = wing_of(module) == "kernels" and ast.unparse(node).split("(")[0].endswith(
            ".register_autograd"
        )
        if not isinstance(node, allowed) and not is_main and not is_types and not is_backward:
            yield f"{module} does something at import, line {node.lineno}"
        if not is_main:
            for call in calls_at_import(node):
                if not is_factory(call, names):
                    yield f"{module} calls {ast.unparse(call)} at import, line {call.lineno}"


def calls_at_import(node: ast.AST) -> Iterator[ast.expr]:
    """Yield what Python calls when it imports a statement, decorators too, but not in functions."""
    if isinstance(node, ast.Call):
        yield node.func
    decorators = getattr(node, "decorator_list", ())
    yield from (each for each in decorators if not isinstance(each, ast.Call))
    inner = ast.iter_child_nodes(node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        inner = [*decorators, *node.args.defaults, *filter(None, node.args.kw_defaults)]
    for child in inner:
        yield from calls_at_import(child)


def is_factory(called: ast.expr, names: dict[str, str]) -> bool:
    """Return whether a call makes a value and has no other effect, as FACTORIES lists them.

    called: the function that is called
    names: imported names of the file
    """
    last = called.attr if isinstance(called, ast.Attribute) else ""
    name = full_name(called, names)
    if name is None:  # a method of a value that was just made, as in Path(__file__).resolve()
        return last in METHODS
    first = name.partition(".")[0]
    if first in ("minillm", "kernels"):
        return name.rpartition(".")[2] in OWN_FACTORIES or last in METHODS
    if first in {full.partition(".")[0] for full in names.values()}:
        return name in FACTORIES
    return name in FACTORIES | OWN_FACTORIES or last in METHODS


def about_docstrings(module: str, body: list[ast.stmt], inside: str = "") -> Iterator[str]:
    """Yield one line for every public function, class or method without a docstring."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{module}: {inside}{node.name} has no docstring"
        if isinstance(node, ast.ClassDef):
            yield from about_docstrings(module, node.body, node.name + ".")


def violations(root: Path) -> list[str]:
    """Return one line for every rule that a file under `root` breaks."""
    found = []
    for module, path in files_of(root).items():
        found += broken_by(module, path.read_text(encoding="utf-8"))
    return found


@cache
def broken_by(module: str, text: str) -> list[str]:
    """Return the rules that a file of this text breaks."""
    tree = ast.parse(text)
    found = [*about_libraries(module, tree), *about_calls(module, tree)]
    found += [*about_the_module(module, tree), *about_docstrings(module, tree.body)]
    if (lines := text.count("\n")) > MAX_LINES:
        found.append(f"{module} has {lines} lines; a file fits one sitting of {MAX_LINES}")
    return found


def test_every_file_keeps_the_rules():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "name",
    ["README.md", "kernels/README.md", "benchmarks/README.md", "benchmarks/recurrence/README.md"],
)
def test_no_number_is_left_to_be_filled_in(name):
    left = [line for line in (ROOT / name).read_text("utf-8").splitlines() if "@@" in line]
    assert left == []


def test_kernels_is_no_package_and_shadows_nobody():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # `python train.py` puts the root first on sys.path: profile.py there would break cProfile.
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts == {"setup.py", "train.py", "sample.py"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the source tree, to plant faults in."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("minillm", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "sample.py"):
        shutil.copy(ROOT / name, root / name)
    return root


GPT, CACHE = "minillm/model/gpt.py", "minillm/model/kv_cache.py"
PLANTED = [
    ("kernels/reference/mlp.py", "import triton", "reference.mlp imports triton"),
    ("kernels/eager/optim.py", "import triton", "eager.optim imports triton"),
    ("minillm/commands/profile.py", "import triton", "commands.profile imports triton"),
    ("kernels/rms_norm.py", "_rms_norm()", "rms_norm does something at import"),
    ("kernels/rms_norm.py", "_x = _rms_norm(1)", "rms_norm calls _rms_norm at import"),
    (GPT, "import os\nx = os.environ", "model.gpt reads the environment"),
    (GPT, "from os import environ", "model.gpt reads the environment"),
    (GPT, "import os\nx = os.getenv('HOME')", "model.gpt reads the environment"),
    (GPT, "import os as o\nx = o.environ['HOME']", "model.gpt reads the environment"),
    (GPT, "from os import environ as e", "model.gpt reads the environment"),
    (GPT, "import os\ndef _f():\n    return getattr(os, 'environ')", "reads the environment"),
    (GPT, "import triton.language as tl", "model.gpt imports triton"),
    (GPT, "def _f(p):\n    return open(p)", "model.gpt opens a file"),
    (CACHE, "print('hello')", "kv_cache does something at import"),
    (CACHE, "for i in range(3):\n    pass", "kv_cache does something at import"),
    (CACHE, "X = print('hi')", "kv_cache calls print at import"),
    (CACHE, "X: int = print('hi')", "kv_cache calls print at import"),
    (CACHE, "p = print\nX = p('hi')", "kv_cache calls p at import"),
    (CACHE, "X = [print(n) for n in (1, 2)]", "kv_cache calls print at import"),
    (CACHE, "from subprocess import run as re\nX = re('ls')", "kv_cache calls re at import"),
    (CACHE, "import os as re\nX = re.compile('ls')", "kv_cache calls re.compile at import"),
    (CACHE, "class _A:\n    x = print('hi')", "kv_cache calls print at import"),
    (CACHE, "def _f(x=print('hi')):\n    return x", "kv_cache calls print at import"),
    (CACHE, "@print\ndef _f(x):\n    return x", "kv_cache calls print at import"),
    (CACHE, "import atexit\n@atexit.register\ndef _f():\n    pass", "calls atexit.register at"),
    (CACHE, "X = torch.manual_seed(0)", "kv_cache calls torch.manual_seed at import"),
    (CACHE, "def public():\n    return 1", "kv_cache: public has no docstring"),
    (CACHE, "class Public:\n    x = 1", "kv_cache: Public has no docstring"),
    (
        CACHE,
        'class Public:\n    """It."""\n    def f(self):\n        return 1',
        "kv_cache: Public.f has no docstring",
    ),
    (CACHE, "import pickle", "kv_cache imports pickle"),
    (CACHE, "def _f(p):\n    return torch.load(p)", "uses torch.load"),
    (CACHE, "def _f(p):\n    torch.save(p, p)", "uses torch.save"),
    (CACHE, "def _f(p):\n    return eval(p)", "kv_cache calls eval()"),
    (CACHE, "def _f(p):\n    exec(p)", "kv_cache calls exec()"),
    (CACHE, "import builtins as b\ndef _f(p):\n    b.exec(p)", "kv_cache calls exec()"),
    (CACHE, "import torch as t\ndef _f(p):\n    return t.load(p)", "uses torch.load"),
    (CACHE, "import torch as t\ndef _f(p):\n    t.save(p, p)", "uses torch.save"),
    (CACHE, "from torch import save as s\ndef _f(p):\n    s(p, p)", "uses torch.save"),
    (CACHE, "import torch as t\ndef _f():\n    t.distributed.barrier()", "uses torch.distributed"),
    (CACHE, "def _f(p):\n    return __import__(p)", "imports by name"),
    (CACHE, "import importlib\ndef _f(p):\n    importlib.import_module(p)", "imports by name"),
    (CACHE, "import importlib as i\ndef _f(p):\n    i.import_module(p)", "imports by name"),
    (CACHE, "from importlib import import_module as i\ndef _f(p):\n    i(p)", "imports by name"),
    (CACHE, "def _f():\n    global X\n    X = 1", "kv_cache has a global: X"),
    (CACHE, "# a line\n" * MAX_LINES, "a file fits one sitting"),
    ("train.py", "import shelve", "train imports shelve"),
    ("minillm/model/utils.py", '"""Tools."""', "utils: the name of a file says what is in it"),
    ("minillm/misc.py", '"""Things."""', "misc: the name of a file says what is in it"),
    ("kernels/helpers.py", '"""Help."""', "helpers: the name of a file says what is in it"),
]


@pytest.mark.parametrize("name, text, message", PLANTED, ids=lambda x: x[:40].replace("\n", " "))
def test_a_planted_violation_is_seen(tree, name, text, message):
    path = tree / name
    before, standing = path.read_text("utf-8") if path.exists() else None, violations(tree)
    path.write_text(f"{before or ''}\n{text}\n", encoding="utf-8")
    new = set(violations(tree)) - set(standing)
    if before is None:
        path.unlink()
    else:
        path.write_text(before, encoding="utf-8")
    assert any(message in line for line in new), new


def test_methods_named_eval_are_no_evaluation():
    tree = ast.parse("model.eval()\nre.compile('x')\nimport torch\ntorch.compile(model)")
    assert list(about_calls("train", tree)) == []


FINE = [
    "import re\nX = re.compile('x')",
    "from dataclasses import dataclass as d\n\n@d(frozen=True)\nclass _A:\n    x: int = 0",
    "X = frozenset('a b'.split())\nY = lambda: print('later')",
    "def _f():\n    print('later')",
    "if __name__ == '__main__':\n    print('started')",
]


@pytest.mark.parametrize("text", FINE, ids=lambda x: x[:30].replace("\n", " "))
def test_factories_and_later_calls_may_stand_outside_functions(text):
    assert list(about_the_module("train", ast.parse(f'"""It."""\n{text}'))) == []
