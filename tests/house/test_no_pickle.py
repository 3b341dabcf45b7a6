"""No Python file of the project, product, script, test or benchmark, reads or writes a pickle or
runs text as code. Seen in the syntax trees: names are followed through imports and their aliases.

What passes between the program's own worker processes on one machine (multiprocessing) is excepted.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.law import ROOT, full_name, names_of

SKIPPED = ("build", "dist", "__pycache__", "runs")
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the source tree is not here"
)

# Modules, and functions by their full name; what lies below one is forbidden too.
FORBIDDEN = frozenset(
    "pickle _pickle cPickle pickletools dill cloudpickle joblib shelve marshal"
    " multiprocessing.reduction torch.save torch.load torch.package torch.serialization torch.hub"
    " torch.jit.save torch.jit.load torch.distributed.checkpoint yaml.load yaml.load_all"
    " builtins.eval builtins.exec builtins.compile".split()
)
# As attributes of anything, so that `dist`, a group or an alias of either makes no difference.
FORBIDDEN_ATTRIBUTES = frozenset(
    "broadcast_object_list all_gather_object gather_object scatter_object_list send_object_list"
    " recv_object_list unsafe_load unsafe_load_all full_load full_load_all read_pickle to_pickle"
    " __reduce__ __reduce_ex__".split()
)
# Arguments that open a door, unless they are the constant False.
FORBIDDEN_ARGUMENTS = frozenset(("allow_pickle", "trust_remote_code", "weights_only"))


def python_files() -> list[Path]:
    """Every .py file of the tree, without what is built or hidden."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if not any(part.startswith(".") or part in SKIPPED for part in parts):
            found.append(path)
    return found


def is_forbidden(name: str) -> bool:
    """Whether a full name is, or lies below, something forbidden."""
    words = name.split(".")
    below = {".".join(words[:n]) for n in range(1, len(words) + 1)}
    return bool(below & FORBIDDEN) or words[-1] in FORBIDDEN_ATTRIBUTES


def violations(text: str) -> Iterator[str]:
    """`line: what` for each use of a pickle or of text as code."""
    tree = ast.parse(text)
    names = names_of(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                name = f"{module}.{alias.name}" if module else alias.name
                if is_forbidden(name):
                    yield f"{node.lineno}: imports {name}"
        elif isinstance(node, ast.FunctionDef) and node.name in FORBIDDEN_ATTRIBUTES:
            yield f"{node.lineno}: defines {node.name}"
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_ARGUMENTS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"{node.value.lineno}: passes {node.arg}"
        elif isinstance(node, ast.expr) and (name := full_name(node, names)):
            # A parameter may be named compile; only a call of it is the built-in.
            if name == "builtins.compile" and id(node) not in called:
                continue
            if isinstance(getattr(node, "ctx", None), ast.Store):
                continue
            if is_forbidden(name):
                yield f"{node.lineno}: uses {name}"


def test_all_kinds_of_files_are_looked_at():
    names = {path.relative_to(ROOT).as_posix() for path in python_files()}
    assert {
        "setup.py", "train.py", "sample.py", "minillm/checkpoint/find.py", "kernels/eager/loss.py",
        "data/tasks.py", "tests/house/test_no_pickle.py", "tests/conftest.py", "benchmarks/nano.py",
    } <= names  # fmt: skip
    assert len(names) > 150


def test_no_pickle_and_no_text_as_code():
    found = []
    for path in python_files():
        name = path.relative_to(ROOT).as_posix()
        found += [f"{name}:{what}" for what in violations(path.read_text(encoding="utf-8"))]
    assert found == []


PLANTED = [
    "import pickle",
    "import cPickle as p",
    "from pickle import loads",
    "def f():\n    import dill",
    "import joblib.numpy_pickle",
    "import shelve",
    "import marshal",
    "from cloudpickle import dumps",
    "from multiprocessing.reduction import ForkingPickler",
    "__import__('pickle')",
    "import importlib\nimportlib.import_module('pickle')",
    "from importlib import import_module as i\ni('dill').loads(b'')",
    "import sys\nsys.modules['pickle'].loads(b'')",
    "import torch\ntorch.load('x')",
    "import torch\ntorch.save(1, 'x')",
    "import torch as t\nt.load('x')",
    "from torch import load",
    "from torch import save as keep",
    "from torch.serialization import load",
    "import torch\nf = torch.load",
    "import torch.package",
    "import torch\ntorch.jit.load('x')",
    "import torch\ntorch.hub.load('x', 'y')",
    "import torch\ngetattr(torch, 'load')('x')",
    "import torch\ntorch.__dict__['load']('x')",
    "import torch\nvars(torch)['save'](1, 'x')",
    "import torch.distributed.checkpoint as dcp",
    "from torch.distributed import checkpoint",
    "import torch.distributed as dist\ndist.broadcast_object_list([1])",
    "import torch.distributed as dist\ndist.all_gather_object([1], 1)",
    "group.gather_object(1)",
    "from torch.distributed import scatter_object_list",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import numpy as np\nnp.save('x', 1, allow_pickle=wish)",
    "import yaml\nyaml.load('x')",
    "import yaml\nyaml.unsafe_load('x')",
    "import pandas\npandas.read_pickle('x')",
    "model_of('x', trust_remote_code=True)",
    "load('x', weights_only=True)",
    "eval('1')",
    "f = eval",
    "exec('1')",
    "exec(compile('1', 'x', 'exec'))",
    "compile('1', 'x', 'eval')",
    "import builtins\nbuiltins.exec('1')",
    "import builtins\ngetattr(builtins, 'eval')('1')",
    "from builtins import eval as understand",
    "__builtins__.__dict__['x']\nvars(__import__('builtins'))['exec']('1')",
    "class C:\n    def __reduce__(self):\n        return 1",
]  # fmt: skip


@pytest.mark.parametrize("text", PLANTED)
def test_a_planted_violation_is_seen(text):
    assert list(violations(text))


ALLOWED = """
import re, json, ast, torch, numpy as np
import multiprocessing
from multiprocessing.connection import wait
from safetensors.torch import load_file, save_file
model.eval(); re.compile("x"); torch.compile(model); json.load(file); np.load("x")
np.load("x", allow_pickle=False)
ast.literal_eval("1")
"pickle", "torch.load", "eval(x)"
def f(compile=False):
    return g(compile=compile) if compile else None
config.compile, self.load(), tokenizer.save(run), getattr(self, "load")
"""


def test_what_only_looks_alike_is_let_through():
    assert list(violations(ALLOWED)) == []
