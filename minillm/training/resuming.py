"""Turn a command line with --resume into the settings to resume the run with."""

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minillm.checkpoint.run_folder import RunFolder, newest_run
from minillm.config.flags import Settings
from minillm.config.resolve import (
    LENGTHS,
    as_train_config,
    resolve,
    resumed_settings,
    without_first_lengths,
)
from minillm.errors import UsageError
from minillm.flags.train import ELSEWHERE, NEWEST, is_elsewhere
from minillm.runtime import relative_paths
from minillm.runtime.files import file_digest


def resumed(args: Namespace) -> tuple[Settings, RunFolder]:
    """Return the settings of the run that --resume names, and its folder.

    The flags that the run was started with may be given again. They are accepted if they state what
    the run is, or what was asked for when it was started.
    """
    run = newest_run(begun=True) if args.resume is NEWEST else RunFolder(args.resume)
    model, train = run.model, run.train
    if is_elsewhere(args.out, run.path) or not relative_paths.equal(
        "init_from", args.init_from or train.get("init_from"), train.get("init_from")
    ):
        raise UsageError(ELSEWHERE)
    flags = {**vars(args), "out": None, "init_from": None}
    # The checkpoint states the changes of an earlier --resume.
    config = as_train_config(run.path, train | run.newest_settings())
    wishes = resolve(flags, args.config, None, asdict(model) | asdict(config))
    wishes = replace(wishes, given=wishes.given - {"out", "overwrite", "init_from"})
    if not LENGTHS & {name for name, value in flags.items() if value is not None}:
        wishes = without_first_lengths(wishes, train)
    return resumed_settings(model, config, wishes, _also_accepted(run, wishes)), run


def _also_accepted(run: RunFolder, wishes: Settings) -> dict[str, list[Any]]:
    """Return other values of settings that mean the run's own, see `resumed_settings`."""
    facts = run.facts
    found = {"vocab_size": [facts["asked_vocab_size"]], "dtype": [facts.get("dtype")],
             "micro_batch_size": [str(facts.get("micro_batch_size"))]}  # fmt: skip
    file = Path(wishes.train.tokenizer)
    if file.is_file() and file_digest(file) == facts["tokenizer_sha256"]:
        found["tokenizer"] = [wishes.train.tokenizer]  # the same tokenizer in another place
    return found
