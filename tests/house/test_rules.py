"""The rules for every source file: nothing happens at import, no globals, docstrings, 300 lines."""

import ast
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.house.law import ROOT, files_of, imported, wing_of

MAX_LINES = 300
ENVIRONMENT = "minillm.runtime.launch"  # the one file that reads the environment
PICKLES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the source tree is not here"
)


def about_libraries(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield one line for every library that this file must not import."""
    wing, leaf = wing_of(module), module.rpartition(".")[2]
    plain = wing == "kernels" and leaf.startswith(("reference", "eager"))
    for dotted in imported(tree):
        top = dotted.split(".")[0]
        if top == "triton" and (plain or wing not in ("kernels", "profiling")):
            yield f"{module} imports triton"
        if top in PICKLES:
            yield f"{module} imports {top}"
        if dotted in ("os.environ", "os.getenv", "os.putenv") and module != ENVIRONMENT:
            yield f"{module} reads the environment"


def about_calls(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield one line for every global, and every call that no file may make."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{module} has a global: {', '.join(node.names)}"
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            reads = owner == "os" and node.attr in ("environ", "getenv", "putenv")
            if reads and module != ENVIRONMENT:
                yield f"{module} reads the environment"
            if owner == "torch" and node.attr in ("save", "load", "distributed"):
                yield f"{module} uses torch.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("eval", "exec", "compile"):
                yield f"{module} calls {node.func.id}()"
            if node.func.id in ("import_module", "__import__") and module not in (
                "minillm.__main__", "minillm",
            ):  # fmt: skip
                yield f"{module} imports by name; only __main__ does"


def about_the_module(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield one line if the file has no docstring, and for all that it does when imported."""
    allowed = (
        ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    )
    if not ast.get_docstring(tree):
        yield f"{module} has no docstring"
    for node in tree.body[1:]:
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        is_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if wing_of(module) == "kernels" and ast.unparse(node).split("(")[0].endswith(
            ".register_autograd"
        ):
            continue  # part of an operator's definition
        if not isinstance(node, allowed) and not is_main and not is_types:
            yield f"{module} does something at import, line {node.lineno}"


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
    ("kernels/reference.py", "import triton", "reference imports triton"),
    ("kernels/eager_optim.py", "import triton", "eager_optim imports triton"),
    ("minillm/commands/profile.py", "import triton", "commands.profile imports triton"),
    ("kernels/rms_norm.py", "_rms_norm()", "rms_norm does something at import"),
    (GPT, "import os\nx = os.environ", "model.gpt reads the environment"),
    (GPT, "from os import environ", "model.gpt reads the environment"),
    (GPT, "import os\nx = os.getenv('HOME')", "model.gpt reads the environment"),
    (GPT, "import triton.language as tl", "model.gpt imports triton"),
    (CACHE, "print('hello')", "kv_cache does something at import"),
    (CACHE, "for i in range(3):\n    pass", "kv_cache does something at import"),
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
    (CACHE, "def _f(p):\n    return __import__(p)", "imports by name"),
    (CACHE, "def _f():\n    global X\n    X = 1", "kv_cache has a global: X"),
    (CACHE, "# a line\n" * MAX_LINES, "a file fits one sitting"),
    ("train.py", "import shelve", "train imports shelve"),
]


@pytest.mark.parametrize("name, text, message", PLANTED, ids=lambda x: x[:40].replace("\n", " "))
def test_a_planted_violation_is_seen(tree, name, text, message):
    path = tree / name
    before, standing = path.read_text("utf-8"), violations(tree)
    path.write_text(f"{before}\n{text}\n", encoding="utf-8")
    new = set(violations(tree)) - set(standing)
    path.write_text(before, encoding="utf-8")
    assert any(message in line for line in new), new


def test_methods_named_eval_are_no_evaluation():
    tree = ast.parse("model.eval()\nre.compile('x')\nimport torch\ntorch.compile(model)")
    assert list(about_calls("train", tree)) == []
