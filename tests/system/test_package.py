"""The ways in: a bare checkout, an editable install (the README's), a wheel away from both."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the checkout")


def run(*argv: str | Path, cwd: Path, path: Path | None = None) -> str:
    """What a command prints; fails with what it said if it fails."""
    env = {**os.environ, "PYTHONPATH": str(path)} if path else dict(os.environ)
    done = subprocess.run(
        [str(word) for word in argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


WHERE = (
    "import minillm.kernels.eager.mlp as e;"
    "import minillm.scripts.train as t, minillm.scripts.sample as s;"
    "print(e.__file__, t.__file__, s.__file__, sep='\\n')"
)


@pytest.mark.slow
def test_bare_checkout_finds_kernels_and_scripts(tmp_path):
    files = run(sys.executable, "-c", WHERE, cwd=tmp_path, path=ROOT).split()
    assert files == [str(ROOT / f) for f in ("kernels/eager/mlp.py", "train.py", "sample.py")]


def test_a_script_given_by_its_path_runs_from_elsewhere(tmp_path):
    assert run(sys.executable, ROOT / "train.py", "--print-config", cwd=tmp_path).startswith("{")


@pytest.mark.slow
def test_kernels_does_not_shadow_the_package_of_that_name(tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("owner = 'somebody else'\n")
    code = "import kernels, minillm.kernels.eager.mlp; print(kernels.owner)"
    # The checkout's root is on the path first, as for `python train.py`; a folder without
    # __init__.py gives way to a real package behind it.
    found = run(sys.executable, "-c", code, cwd=ROOT, path=tmp_path)
    assert found.strip() == "somebody else"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A folder with the wheel's content, as site-packages would hold it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    keep = (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "train.py",
        "sample.py",
        "minillm",
        "kernels",
    )
    source.mkdir()
    for name in keep:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, cwd=folder)
    (made,) = folder.glob("*.whl")
    target = folder / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, made,
        cwd=folder)  # fmt: skip
    return target


@pytest.mark.slow
def test_wheel_holds_the_very_same_scripts_and_no_setup(wheel):
    scripts = wheel / "minillm" / "scripts"
    assert sorted(p.name for p in scripts.glob("*.py")) == ["sample.py", "train.py"]
    for name in ("train.py", "sample.py"):
        assert (scripts / name).read_bytes() == (ROOT / name).read_bytes()
    assert (wheel / "minillm" / "py.typed").is_file()
    for folder in ("", "reference", "eager"):
        kernels = {p.name for p in (ROOT / "kernels" / folder).glob("*.py")}
        packed = wheel / "minillm" / "kernels" / folder
        assert kernels and {p.name for p in packed.glob("*.py")} == kernels
    assert not (wheel / "train.py").exists() and not (wheel / "kernels").exists()


IMPORT_ALL = """
import importlib, pkgutil, minillm
for found in pkgutil.walk_packages(minillm.__path__, "minillm."):
    if not found.name.endswith("__main__"):
        print(importlib.import_module(found.name).__file__)
"""


@pytest.mark.slow
def test_wheel_holds_every_file_and_every_module_can_be_imported_from_it(wheel, tmp_path):
    home = wheel / "minillm"
    for source, packed in ((ROOT / "minillm", home), (ROOT / "kernels", home / "kernels")):
        files = [p.relative_to(source) for kind in ("*.py", "*.json") for p in source.rglob(kind)]
        assert len(files) > 20 and [f for f in files if not (packed / f).is_file()] == []
    found = run(sys.executable, "-c", IMPORT_ALL, cwd=tmp_path, path=wheel).splitlines()
    assert len(found) > 100 and all(Path(p).is_relative_to(home) for p in found)


@pytest.mark.slow
def test_wheel_trains_and_samples_away_from_the_checkout(wheel, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 200)
    python = (sys.executable, "-m", "minillm")
    early = subprocess.run(
        [*python, "sample"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert early.stderr.endswith(" -m minillm train\n"), early.stderr  # no train.py is here
    run(*python, "train", "--data", "text.txt", "--tokenizer", "char", "--steps", "5", "--threads",
        "1", "--n-layer", "1", "--d-model", "32", "--n-head", "2", "--seq-len", "16",
        cwd=tmp_path, path=wheel)  # fmt: skip
    assert (tmp_path / "runs" / "nano-1" / "config.json").is_file()
    text = run(
        *python, "sample", "--prompt", "to be", "--max-tokens", "20", cwd=tmp_path, path=wheel
    )
    assert text.startswith("to be") and len(text) > 20


# Of each part of the package, with all that starts programs, reads the wheel's own files or runs
# kernels: test_triton_model.py runs every kernel, with the wheel's tables.
ELSEWHERE = """
    checkpoint/test_find checkpoint/test_hostile_files checkpoint/test_old_formats
    config/test_resolve convert/test_huginn data/test_batches data/test_documents
    data/test_formats data/test_prepare data/test_tokenizer distributed/test_zero
    flags/test_help flags/test_quick_answers inference/test_early_exit inference/test_generate
    inference/test_speculative model/test_gpt model/test_ops model/test_triton_model
    optim/test_build planning/test_cards planning/test_estimate profiling/test_profile
    profiling/test_catalogue runtime/test_cli runtime/test_device runtime/test_launch
    runtime/test_relative_paths runtime/test_terminal system/test_bad_input
    system/test_bad_input_processes system/test_bad_input_verbs system/test_resume
    system/test_sample system/test_train training/test_budget_on_resume training/test_evaluate
    training/test_stopping
""".split()


@pytest.mark.slow
def test_the_tests_pass_from_the_wheel(wheel, tmp_path):
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = "import minillm; print(minillm.__file__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path, path=wheel)
    assert Path(found.strip()).is_relative_to(wheel)
    files = [f"tests/{name}.py" for name in ELSEWHERE]
    run(sys.executable, "-m", "pytest", "-q", "-x", *files, "-p", "no:cacheprovider",
        cwd=tmp_path, path=wheel)  # fmt: skip
