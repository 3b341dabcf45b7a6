"""A `~` at the start of a path is the home folder, wherever a path is given."""

import json
import os
from argparse import ArgumentParser
from pathlib import Path

import pytest

from minillm.config.config_files import read_config
from minillm.flags import plan, prepare, profile, sample, train
from minillm.runtime import cli

# The arguments of each command line that are no paths, though they are texts without choices.
NO_PATHS = {
    "gpu", "text_column", "encoding", "sample_prompt",
    "vocab_size", "device", "threads", "micro_batch_size", "recurrent", "time_limit", "prompt",
    "stop", "checkpoint", "tune", "op", "help",
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    return folder


def paths_of(parser: ArgumentParser) -> dict[str, object]:
    """The arguments that take a text of any kind, less those that are no paths: what each makes
    of ~/a.
    """
    found = {}
    for action in parser._actions:
        if action.nargs == 0 or action.choices or action.dest in NO_PATHS:
            continue
        try:
            found[action.dest] = (action.type or str)("~/a")
        except Exception:  # a number, or one of some names
            continue
    return found


@pytest.mark.parametrize(
    "parser, least",
    [
        (
            train.parser,
            {"data", "val", "out", "init_from", "tokenizer", "cache_dir", "config", "resume"},
        ),
        (sample.parser, {"run", "prompt_file"}),
        (prepare.parser, {"paths", "out", "cache_dir", "tokenizer"}),
        (profile.parser, {"out", "trace"}),
        (plan.parser, {"data", "links"}),
    ],
)
def test_every_path_of_a_command_line_may_begin_at_home(home, parser, least):
    found = paths_of(parser())
    assert found.keys() >= least
    assert {name: str(value) for name, value in found.items()} == dict.fromkeys(
        found, str(home / "a")
    )


def test_every_path_of_a_config_file_may_begin_at_home(home, tmp_path):
    names = ("data", "val", "out", "init_from", "tokenizer", "cache_dir")
    file = tmp_path / "a.json"
    file.write_text(json.dumps(dict.fromkeys(names, "~/a")))
    assert read_config(file) == dict.fromkeys(names, str(home / "a"))


def test_a_tilde_that_is_no_home_stays(home):
    for text in ("a~", "./~", "bpe", "", "~no-such-user/a"):
        assert cli.path_text(text) == text
    assert cli.path_text("~") == str(home)


def test_no_folder_called_tilde_is_made(home, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("--out", "~/run", "--cache-dir", "~/cache", "--steps", "1") == 0
    assert not os.path.lexists("~") and {p.name for p in home.iterdir()} == {"run", "cache"}
