"""The files of a run are known by their content, not only by their names."""

import shutil

import pytest

from minillm.checkpoint import placing
from minillm.checkpoint.write import tidy
from tests.runtime.test_ownership import tree

FOREIGN = {
    "metrics.jsonl": '{"step": 1, "loss": 2.0}\n', "samples.txt": '{"x":1}\n',
    "bad-steps.jsonl": "hi\n", "lock": "123\n", "tokenizer.json": '{"version": 1, "kind": "byte"}',
    "metrics.jsonl.tmp": "hi\n", "config.json.tmp": "{}", "tokenizer.model.tmp": "mine",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_files_are_not_a_runs_because_of_a_copied_configuration(
    tiny_run, train, tmp_path, capsys, name
):
    """--config invites people to copy the config.json of a run into a folder of their own."""
    run = tmp_path / "mine"
    run.mkdir()
    shutil.copy(tiny_run / "config.json", run)
    (run / name).write_text(FOREIGN[name])
    before = tree(run)
    assert train("--out", run, "--overwrite") == 2
    assert f"{name} in it is not" in capsys.readouterr().err
    assert tree(run) == before


def test_the_metrics_of_others_are_not_cut_by_a_resumed_run(tiny_run, train, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "metrics.jsonl").write_text("mine\n")
    assert train("--resume", run, "--steps", "9") == 2
    assert f"{run / 'metrics.jsonl'} is not one that minillm wrote" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("half", ["", '{"st', '{"step": 12, "tok', '{"step": 1, "tokens": 12, "l'])
def test_half_a_row_of_a_killed_process_is_ours(tiny_run, tmp_path, half):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "metrics.jsonl").write_text(half)
    (run / "metrics.jsonl.tmp").write_text(half)
    placing.check_out(run, True)
    tidy(run)
    assert not (run / "metrics.jsonl.tmp").exists()
