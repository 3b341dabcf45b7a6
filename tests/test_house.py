"""The laws of the house, read off the source: imports run down, nothing happens at import, ..."""

import ast
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

# A file imports from strictly lower floors only. A new file gets its line here.
FLOORS = {
    0: "__init__ buckets cache commands/__init__ errors flags/__init__ guard help_text json_text "
    "kernels kernels/_entrance kernels/_interpreter kernels/_tanh kernels/eager_sampling "
    "kernels/reference_optim kernels/reference_sampling machine_errors offload outlook "
    "positions precision presets profiling/__init__ profiling/dry profiling/occupancy "
    "profiling/pivot profiling/sass profiling/style profiling/ttir schedule scripts "
    "sentencepieces stopwatch terminal units",
    1: "bpe ceilings cli console encodings exit_rules foreign kernels/_launch kernels/_loss "
    "kernels/eager_optim kernels/reference links pickles pieces places plan_text "
    "profiling/bound profiling/calls profiling/columns profiling/plot profiling/roofline "
    "profiling/tables setting signals state statetensors storage versions",
    2: "cards kernels/_attention_blocks kernels/_rope_kernels kernels/_rows kernels/adamw "
    "kernels/eager_attention kernels/eager_loss kernels/linear_cross_entropy "
    "kernels/newton_schulz kernels/sample kernels/swiglu ownership plaintext "
    "profiling/machine profiling/workloads program shape table tensorfiles",
    3: "config discarding htmltext kernels/_attention_backward kernels/_attention_forward "
    "kernels/decode_attention kernels/eager kernels/rope_cache kernels/sandwich_norm launch "
    "place plan profiling/precision profiling/sizes rows start tokenizer",
    4: "encoding flags/profile flags/sample formats kernels/attention kernels/rms_norm "
    "kernels/rope meter not_a_run ranks settings shards stream world",
    5: "__main__ agreement config_files data documents heldout ops profiling/cases sequences "
    "trained watch",
    6: "configure flags/prepare layers optim pace profiling/audit profiling/implementations "
    "profiling/ranks reading survey",
    7: "flags/train profiling/interpreted profiling/page recurrence runs split zero",
    8: "corpus flags/plan model placing profiling/operations profiling/report resuming",
    9: "activations commands/prepare evaluate exits fsdp huginn profiling/decoding "
    "profiling/steps profiling/tune requests saving startup",
    10: "checkpoint generate ladder plan_fit profiling/suites profiling/trace sharding",
    11: "commands/profile gradients hardware microbatch speculate training",
    12: "announce commands/plan mishaps sample samples validation",
    13: "train",
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
MAX_LINES = 300
DISTRIBUTED = ("ranks", "zero", "fsdp")
PICKLES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the source tree is not here"
)


def rooms_of(root: Path) -> dict[str, Path]:
    """The files under the laws: "model", "commands/prepare", "kernels/eager", "train" -> path."""
    found = {}
    for path in sorted((root / "minillm").rglob("*.py")):
        found[path.relative_to(root / "minillm").with_suffix("").as_posix()] = path
    for path in sorted((root / "kernels").rglob("*.py")):
        found[path.relative_to(root).with_suffix("").as_posix()] = path
    for name in ("train", "sample"):
        found[name] = root / f"{name}.py"
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """The dotted name of each import in the file, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_named(dotted: str, rooms: frozenset[str]) -> str | None:
    """The file a name such as minillm.model.GPT comes from; None if it is not ours."""
    words = dotted.split(".")
    if words[0] in ("train", "sample"):
        return words[0]
    if words[0] == "kernels":
        return "/".join(words[:2])
    if words[0] != "minillm":
        return None
    words = words[1:]
    if words[:1] == ["scripts"] and len(words) > 1:
        words = words[1:]
    for n in (2, 1):
        if "/".join(words[:n]) in rooms and not (
            n == 1 and len(words) > 1 and words[0] == "kernels"
        ):
            return "/".join(words[:n])
    if len(words) > 1 and words[0] in ("kernels", "commands", "profiling"):
        return "/".join(words[:2])
    return "__init__"


def about_imports(room: str, tree: ast.Module, rooms: frozenset[str]) -> Iterator[str]:
    for dotted in imported(tree):
        if dotted.startswith("."):
            yield f"{room} imports relatively: {dotted}"
            continue
        top = dotted.split(".")[0]
        target = room_named(dotted, rooms)
        if target is not None and FLOOR_OF.get(target, 99) >= FLOOR_OF.get(room, -1):
            yield f"{room} may not import {target}"
        if target and target.startswith("kernels") and not (
            room == "ops" or room.startswith(("kernels/", "profiling/"))
        ):  # fmt: skip
            yield f"{room} names kernels; only ops and profiling do"
        if room.startswith("kernels/") and target and not target.startswith("kernels"):
            yield f"{room} knows more than kernels: {target}"
        plain = room.startswith(("kernels/reference", "kernels/eager"))
        if top == "triton" and (plain or not room.startswith(("kernels/", "profiling/"))):
            yield f"{room} imports triton"
        if dotted.startswith("torch.distributed") and room not in DISTRIBUTED:
            yield f"{room} imports torch.distributed"
        if top in PICKLES:
            yield f"{room} imports {top}"
        if dotted in ("os.environ", "os.getenv", "os.putenv") and room != "launch":
            yield f"{room} reads the environment"


def about_calls(room: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{room} has a global: {', '.join(node.names)}"
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner == "os" and node.attr in ("environ", "getenv", "putenv") and room != "launch":
                yield f"{room} reads the environment"
            if owner == "torch" and node.attr in ("save", "load", "distributed"):
                yield f"{room} uses torch.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("eval", "exec", "compile"):
                yield f"{room} calls {node.func.id}()"
            if node.func.id in ("import_module", "__import__") and room != "__main__":
                yield f"{room} imports by name; only __main__ does"


def about_the_module(room: str, tree: ast.Module) -> Iterator[str]:
    allowed = (
        ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    )
    if not ast.get_docstring(tree):
        yield f"{room} has no docstring"
    for node in tree.body[1:]:
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        if room.startswith("kernels/") and ast.unparse(node).split("(")[0].endswith(
            ".register_autograd"
        ):
            continue  # part of an operator's definition
        if not isinstance(node, allowed) and not is_main:
            yield f"{room} does something at import, line {node.lineno}"


def about_docstrings(room: str, body: list[ast.stmt], inside: str = "") -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{room}: {inside}{node.name} has no docstring"
        if isinstance(node, ast.ClassDef):
            yield from about_docstrings(room, node.body, node.name + ".")


def violations(root: Path) -> list[str]:
    """Every law that a file under `root` breaks, in one line each."""
    rooms, found = rooms_of(root), []
    found += [f"{room} has no floor" for room in rooms if room not in FLOOR_OF]
    found += [f"{room} has a floor but no file" for room in FLOOR_OF if room not in rooms]
    for room, path in rooms.items():
        found += broken_by(room, path.read_text(encoding="utf-8"), frozenset(rooms))
    return found


@cache
def broken_by(room: str, text: str, rooms: frozenset[str]) -> list[str]:
    tree = ast.parse(text)
    found = [*about_imports(room, tree, rooms), *about_calls(room, tree)]
    found += [*about_the_module(room, tree), *about_docstrings(room, tree.body)]
    if (lines := text.count("\n")) > MAX_LINES:
        found.append(f"{room} has {lines} lines; a file fits one sitting of {MAX_LINES}")
    return found


def test_the_house_keeps_its_laws():
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
def copy(tmp_path_factory) -> Path:
    """The house once more, to plant faults in."""
    root = tmp_path_factory.mktemp("house")
    for folder in ("minillm", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "sample.py"):
        shutil.copy(ROOT / name, root / name)
    return root


PLANTED = [
    (
        "kernels/newcomer.py",
        '"""New."""\nfrom minillm.model import GPT',
        "kernels/newcomer has no floor",
    ),
    (
        "kernels/eager.py",
        "from minillm.model import GPT",
        "kernels/eager may not import model",
    ),
    ("kernels/eager.py", "from minillm.errors import UsageError", "knows more than kernels"),
    ("kernels/reference.py", "import triton", "kernels/reference imports triton"),
    ("kernels/eager_optim.py", "import triton", "kernels/eager_optim imports triton"),
    ("minillm/commands/profile.py", "import triton", "commands/profile imports triton"),
    ("minillm/commands/profile.py", "from minillm.kernels import eager", "profile names kernels"),
    ("minillm/profiling/report.py", "from minillm.commands import profile", "may not import"),
    ("kernels/rms_norm.py", "_rms_norm()", "kernels/rms_norm does something at import"),
    ("minillm/model.py", "import os\nx = os.environ", "model reads the environment"),
    ("minillm/model.py", "from os import environ", "model reads the environment"),
    ("minillm/data.py", "import os\nx = os.getenv('HOME')", "data reads the environment"),
    ("minillm/model.py", "import torch.distributed as dist", "model imports torch.distributed"),
    ("minillm/model.py", "from torch import distributed", "model imports torch.distributed"),
    ("minillm/model.py", "import triton.language as tl", "model imports triton"),
    ("minillm/model.py", "from minillm.kernels import eager", "model names kernels; only ops"),
    (
        "minillm/model.py",
        "from minillm.kernels.eager import rope",
        "model names kernels; only ops",
    ),
    ("minillm/model.py", "from kernels import eager", "model names kernels; only ops"),
    ("minillm/model.py", "from minillm import generate", "model may not import generate"),
    ("minillm/model.py", "import minillm.checkpoint", "model may not import checkpoint"),
    ("minillm/model.py", "def f():\n    from train import main", "model may not import train"),
    ("minillm/model.py", "from minillm.scripts import train", "model may not import train"),
    ("minillm/model.py", "from minillm.scripts.train import main", "model may not import train"),
    ("minillm/runs.py", "from minillm import checkpoint", "runs may not import checkpoint"),
    ("minillm/model.py", "from .cache import KVCache", "model imports relatively: .cache.KVCache"),
    ("minillm/model.py", "from minillm.commands import prepare", "may not import commands/prepare"),
    ("minillm/ops.py", "from minillm.training import Training", "ops may not import training"),
    ("minillm/newcomer.py", '"""New."""', "newcomer has no floor"),
    ("minillm/cache.py", "print('hello')", "cache does something at import"),
    ("minillm/cache.py", "for i in range(3):\n    pass", "cache does something at import"),
    ("minillm/cache.py", "def public():\n    return 1", "cache: public has no docstring"),
    ("minillm/cache.py", "class Public:\n    x = 1", "cache: Public has no docstring"),
    (
        "minillm/cache.py",
        'class Public:\n    """It."""\n    def f(self):\n        return 1',
        "cache: Public.f has no docstring",
    ),
    ("minillm/checkpoint.py", "import pickle", "checkpoint imports pickle"),
    ("minillm/checkpoint.py", "def _f(p):\n    return torch.load(p)", "uses torch.load"),
    ("minillm/checkpoint.py", "def _f(p):\n    torch.save(p, p)", "uses torch.save"),
    ("minillm/configure.py", "def _f(p):\n    return eval(p)", "configure calls eval()"),
    ("minillm/configure.py", "def _f(p):\n    exec(p)", "configure calls exec()"),
    ("minillm/configure.py", "def _f(p):\n    return __import__(p)", "imports by name"),
    ("minillm/world.py", "def _f():\n    global X\n    X = 1", "world has a global: X"),
    ("minillm/cache.py", "# a line\n" * (MAX_LINES - 70), "a file fits one sitting"),
    ("train.py", "import shelve", "train imports shelve"),
]


@pytest.mark.parametrize("name, text, message", PLANTED, ids=lambda x: x[:40].replace("\n", " "))
def test_a_planted_violation_is_seen(copy, name, text, message):
    path = copy / name
    before = path.read_text() if path.exists() else None
    standing = violations(copy)
    path.write_text((before or "") + "\n" + text + "\n" if before else text + "\n")
    try:
        new = set(violations(copy)) - set(standing)
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
    assert any(message in line for line in new), new
    assert violations(copy) == standing


def test_a_missing_file_is_seen(copy):
    path = copy / "minillm" / "meter.py"
    away = path.rename(copy / "meter.away")
    assert "meter has a floor but no file" in violations(copy)
    away.rename(path)


def test_methods_named_eval_are_no_evaluation():
    tree = ast.parse("model.eval()\nre.compile('x')\nimport torch\ntorch.compile(model)")
    assert list(about_calls("train", tree)) == []
