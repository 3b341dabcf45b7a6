"""Commands that messages give can be pasted, however the program was started."""

import shlex
import sys
from pathlib import Path

import pytest

from minillm.checkpoint import placing
from minillm.checkpoint.run_folder import newest_run
from minillm.errors import UsageError
from minillm.runtime import launch
from minillm.runtime.files import write_json
from minillm.runtime.launch import shell_command

ROOT = Path(launch.__file__).resolve().parents[2]
CHECKOUT = (ROOT / "train.py").is_file()


@pytest.fixture
def started(monkeypatch):
    """started(orig_argv): as if the process had been started by these words."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def start(*words: str, argv0: str) -> None:
        monkeypatch.setattr(sys, "orig_argv", list(words))
        monkeypatch.setattr(sys, "argv", [argv0])

    return start


@pytest.mark.skipif(not CHECKOUT, reason="needs the checkout")
def test_a_script_of_the_checkout_names_its_neighbour(started, monkeypatch):
    monkeypatch.chdir(ROOT)
    started("python3", "train.py", argv0="train.py")
    assert shell_command("sample", "runs/nano-1") == "python3 sample.py runs/nano-1"
    assert shell_command("train", "--resume", "a b") == "python3 train.py --resume 'a b'"
    assert shell_command("plan") == "python3 -m minillm plan"
    monkeypatch.chdir("/")
    started("python3", f"{ROOT}/sample.py", argv0=f"{ROOT}/sample.py")
    assert shell_command("train") == f"python3 {shlex.quote(str(ROOT / 'train.py'))}"


def test_the_console_script_and_the_module_name_themselves(started, monkeypatch, tmp_path):
    script = tmp_path / "minillm"
    script.touch(mode=0o755)
    started("/usr/bin/python3", str(script), argv0=str(script))
    assert shell_command("sample", "r") == f"{script} sample r"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shell_command("sample", "r") == "minillm sample r"
    started("python3", "-m", "minillm", argv0=f"{Path(launch.__file__).parents[1]}/__main__.py")
    assert shell_command("sample", Path("it's")) == "python3 -m minillm sample 'it'\"'\"'s'"


def test_a_program_that_the_shell_does_not_find_keeps_its_path(started, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    started("/a b/python", "-m", "minillm", argv0=f"{Path(launch.__file__).parents[1]}/__main__.py")
    assert shell_command("train") == "'/a b/python' -m minillm train"


def test_ranks_are_started_together_again(started, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    started("python3", "-m", "minillm", argv0=f"{Path(launch.__file__).parents[1]}/__main__.py")
    assert shell_command("train", "--resume") == (
        "torchrun --standalone --nproc-per-node 4 -m minillm train --resume"
    )
    assert shell_command("sample") == "python3 -m minillm sample"


def test_messages_quote_a_run_with_a_space(started, tmp_path):
    started("python3", "-m", "minillm", argv0=f"{Path(launch.__file__).parents[1]}/__main__.py")
    with pytest.raises(UsageError, match="train one with: python3 -m minillm train$"):
        newest_run(tmp_path)
    run = tmp_path / "my run"
    run.mkdir()
    write_json(run / "config.json", {"model": {}, "train": {}, "tokenizer_sha256": ""})
    with pytest.raises(UsageError) as refusal:
        placing.check_out(run, False)
    assert f"python3 -m minillm train --resume '{run}'" in str(refusal.value)
