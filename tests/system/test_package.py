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
    "import minillm.kernels.eager as e, minillm.scripts.train as t, minillm.scripts.sample as s;"
    "print(e.__file__, t.__file__, s.__file__, sep='\\n')"
)


def test_bare_checkout_finds_kernels_and_scripts(tmp_path):
    files = run(sys.executable, "-c", WHERE, cwd=tmp_path, path=ROOT).split()
    assert files == [str(ROOT / f) for f in ("kernels/eager.py", "train.py", "sample.py")]


def test_a_script_given_by_its_path_runs_from_elsewhere(tmp_path):
    assert run(sys.executable, ROOT / "train.py", "--print-config", cwd=tmp_path).startswith("{")


def test_kernels_does_not_shadow_the_package_of_that_name(tmp_path):
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("owner = 'somebody else'\n")
    code = "import kernels, minillm.kernels.eager; print(kernels.owner)"
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
    kernels = {p.name for p in (ROOT / "kernels").glob("*.py")}
    assert {p.name for p in (wheel / "minillm" / "kernels").glob("*.py")} == kernels
    assert not (wheel / "train.py").exists() and not (wheel / "kernels").exists()


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


@pytest.mark.slow
def test_the_tests_pass_from_the_wheel(wheel, tmp_path):
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = "import minillm; print(minillm.__file__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path, path=wheel)
    assert Path(found.strip()).is_relative_to(wheel)
    # What reads the tree itself stays at home, and so do the proofs of single kernels, which take
    # minutes: test_triton_model.py runs every kernel, with the wheel's tables.
    elsewhere = ["--ignore", "tests/house", "--ignore", "tests/kernels"]
    run(sys.executable, "-m", "pytest", "-q", "-x", *elsewhere, "-p", "no:cacheprovider",
        cwd=tmp_path, path=wheel)  # fmt: skip
