"""The import law: a wing imports only from wings to its left, and files never in a circle."""

import ast
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.house.law import ROOT, circles, file_named, files_of, imported, wing_of

ORDER = (
    "errors kernels ops runtime config optim data model distributed checkpoint reporting inference "
    "planning flags training"
).split()
# These stand above ORDER and do not import one another.
TOP = frozenset("convert surgery evaluation finetuning serving sweeps profiling".split())
# These may import everything except one another.
PROGRAMS = frozenset("commands train sample".split())
# The first line of every program, the public face and the bridges to files outside the package.
DOORS = frozenset("minillm __main__ scripts".split())
# What a wing must not know, though it stands to its left, or is a library. A name stands for all
# that lies below it. A model is maths: it knows no files, no tokenizer and no terminal.
UNKNOWN_TO = {
    "model": (
        "minillm.data minillm.runtime pathlib os io shutil tempfile glob fnmatch fcntl mmap json "
        "csv sqlite3 zipfile tarfile gzip safetensors tokenizers sentencepiece sys argparse "
        "logging subprocess multiprocessing threading socket signal urllib http"
    ).split()
}

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the source tree is not here"
)


def may_import(a: str, b: str) -> bool:
    """Return whether a file of wing `a` may import from wing `b`."""
    if a == b or a in DOORS:
        return a != "commands"  # each command stands alone
    if a in PROGRAMS:
        return b not in PROGRAMS | DOORS
    return b in ORDER and (a not in ORDER or ORDER.index(b) < ORDER.index(a))


def about_imports(module: str, path: Path, modules: frozenset[str]) -> Iterator[str]:
    """Yield one line for every import of a file that the law forbids."""
    wing = wing_of(module)
    for dotted in _imports_of(path.read_text(encoding="utf-8")):
        if dotted.startswith("."):
            yield f"{module} imports relatively: {dotted}"
            continue
        if path.name == "__init__.py" and module != "minillm":
            yield f"{module} is an __init__ and imports {dotted}"
        if dotted.startswith("torch.distributed") and wing != "distributed":
            yield f"{module} imports torch.distributed"
        target = file_named(dotted, modules)
        for unknown in UNKNOWN_TO.get(wing, ()):
            if f"{target or dotted}.".startswith(f"{unknown}."):
                yield f"{module} imports {dotted}; {wing} does not know {unknown}"
        if target is None or target == module:
            continue
        if target == "minillm":
            if dotted not in ("minillm", "minillm.__version__") and wing not in DOORS:
                yield f"{module} takes {dotted} from the public face; name its file"
            continue
        if not may_import(wing, wing_of(target)):
            yield f"{module} may not import {target}"
        names_kernels = wing_of(target) == "kernels"
        if names_kernels and wing not in ("kernels", "ops", "profiling", "minillm"):
            yield f"{module} names kernels; only ops and profiling do"
        if wing == "kernels" and not names_kernels:
            yield f"{module} knows more than kernels: {target}"
        if (wing, wing_of(target)) == ("data", "config"):
            yield f"{module} imports config; data does not know it"


@cache
def _imports_of(text: str) -> list[str]:
    return list(imported(ast.parse(text)))


def violations(root: Path) -> list[str]:
    """Return one line for every import under `root` that breaks the law."""
    files = files_of(root)
    modules, found, arrows = frozenset(files), [], {}
    for module, path in files.items():
        found += about_imports(module, path, modules)
        targets = {file_named(name, modules) for name in _imports_of(path.read_text("utf-8"))}
        arrows[module] = targets - {None, "minillm", module}
        wing = wing_of(module)
        if wing not in {*ORDER, *TOP, *PROGRAMS, *DOORS}:
            found.append(f"{module}: there is no wing {wing}; ORDER in {Path(__file__).name}")
    return found + [f"{' and '.join(group)} import one another" for group in circles(arrows)]


def test_imports_keep_the_law():
    assert violations(ROOT) == []


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the source tree, to plant violations in."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("minillm", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "sample.py"):
        shutil.copy(ROOT / name, root / name)
    return root


PLANTED = [
    ("minillm/model/gpt.py", "from minillm.training import state", "gpt may not import minillm.tr"),
    ("minillm/model/gpt.py", "from minillm.inference.generate import generate", "may not import"),
    ("minillm/model/gpt.py", "def f():\n    from train import main", "gpt may not import train"),
    ("minillm/model/gpt.py", "from minillm.scripts.train import main", "gpt may not import train"),
    ("minillm/model/gpt.py", "from minillm.commands import prepare", "may not import minillm.comm"),
    (
        "minillm/model/gpt.py",
        "from minillm.model.newcomer import x",
        "gpt and minillm.model.newcom",
    ),
    ("minillm/model/gpt.py", "import torch.distributed as dist", "gpt imports torch.distributed"),
    ("minillm/model/gpt.py", "from torch import distributed", "gpt imports torch.distributed"),
    (
        "minillm/model/gpt.py",
        "from minillm.kernels.eager import rope",
        "gpt names kernels; only op",
    ),
    ("minillm/model/gpt.py", "from kernels import eager", "gpt names kernels; only ops"),
    ("minillm/model/gpt.py", "from .kv_cache import KVCache", "imports relatively: .kv_cache.KVC"),
    ("minillm/model/gpt.py", "from minillm import load", "takes minillm.load from the public face"),
    ("minillm/model/gpt.py", "from minillm.data.tokenizer import Tokenizer", "not know minillm.da"),
    ("minillm/model/gpt.py", "import minillm.data.tokenizer_base as b", "not know minillm.data"),
    ("minillm/model/gpt.py", "from minillm.data import batches", "not know minillm.data"),
    ("minillm/model/gpt.py", "from minillm.runtime.files import write", "not know minillm.runtime"),
    ("minillm/model/gpt.py", "def f():\n    from pathlib import Path", "does not know pathlib"),
    ("minillm/model/gpt.py", "import os.path", "model does not know os"),
    ("minillm/model/gpt.py", "from os import replace as put", "model does not know os"),
    ("minillm/model/gpt.py", "import io as x", "model does not know io"),
    ("minillm/model/gpt.py", "from safetensors.torch import load", "does not know safetensors"),
    ("minillm/model/__init__.py", "import math", "minillm.model is an __init__ and imports math"),
    (
        "minillm/data/shards.py",
        "from minillm.config.train import TrainConfig",
        "shards imports config",
    ),
    (
        "minillm/ops.py",
        "from minillm.config.flags import Settings",
        "ops may not import minillm.con",
    ),
    ("minillm/convert/huginn.py", "from minillm.profiling.timing import steps", "may not import"),
    (
        "minillm/commands/plan.py",
        "from minillm.commands import profile",
        "plan may not import",
    ),
    ("minillm/commands/plan.py", "from minillm.kernels import eager", "plan names kernels; only"),
    (
        "kernels/eager/mlp.py",
        "from minillm.errors import UsageError",
        "mlp knows more than kernels",
    ),
    ("minillm/pantry/jam.py", '"""Jam."""', "minillm.pantry.jam: there is no wing pantry"),
]


@pytest.mark.parametrize("name, text, message", PLANTED, ids=lambda x: x[:40].replace("\n", " "))
def test_a_planted_import_is_seen(tree, name, text, message):
    path, newcomer = tree / name, tree / "minillm" / "model" / "newcomer.py"
    before = path.read_text("utf-8") if path.exists() else None
    newcomer.write_text('"""New."""\nfrom minillm.model import gpt\n', encoding="utf-8")
    standing = violations(tree)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{before or ''}\n{text}\n", encoding="utf-8")
    new = set(violations(tree)) - set(standing)
    if before is None:
        shutil.rmtree(path.parent)
    else:
        path.write_text(before, encoding="utf-8")
    newcomer.unlink()
    assert any(message in line for line in new), new
