"""Flags of train.py, and the errors that can be found without torch."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minillm.config.config_files import read_config
from minillm.config.flags import ALIASES, Settings, add_flags, notes
from minillm.config.resolve import resolve
from minillm.data import documents
from minillm.errors import UsageError
from minillm.runtime import cli
from minillm.runtime.launch import shell_command

NEWEST = object()  # value of --resume without a name
ELSEWHERE = "--resume continues in the run's own folder; drop --out, --overwrite and --init-from"
COMMON = (
    *("data", "preset", "time_limit", "steps", "out", "resume", "config", "n_layer", "n_head"),
    *("d_model", "seq_len", "batch_size", "learning_rate", "device", "compile", "help"),
)
EPILOG = (
    "Underscores may stand for dashes. --no-NAME turns a switch off. A flag wins over the same "
    "setting in --config, and that over --preset."
)
# Device files of the drivers: CUDA, CUDA in WSL and on a Jetson, ROCm.
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/kfd")


def parse(argv: Sequence[str]) -> Namespace:
    """Parse train.py's flags; raise UsageError on errors that can be found without torch."""
    args = parser().parse(argv)
    check(args)
    return args


def parser() -> cli.Parser:
    """Return the parser of train.py's flags."""
    start = partial(shell_command, "train")
    p = cli.Parser(
        prog=start(),
        description="Train a decoder on text.",
        epilog=EPILOG,
        aliases=ALIASES,
        common=COMMON,
        examples=(
            (start(), "train on the source code of this Python, as a first try"),
            (start("--data", "my.txt", "--time-limit", "10m"), "train on a text for ten minutes"),
            (start("--resume"), "continue the newest run"),
        ),
        values=values,
    )
    add_to(p)
    return p


def add_to(p: cli.Parser) -> None:
    """Add train.py's flags to a parser."""
    p.add_argument(
        "--config", metavar="FILE", type=cli.path_text,
        help="file with settings, .toml or .json, as --print-config prints them, or the "
        "config.json of a run, to repeat it. A --preset flag replaces the preset of such a file, "
        "but not the settings in which the file differs from its preset",
    )  # fmt: skip
    p.add_argument(
        "--resume", nargs="?", const=NEWEST, metavar="RUN", type=cli.path_text,
        help="run to continue (without RUN: the newest)",
    )  # fmt: skip
    p.add_argument("--print-config", action="store_true", help="print the settings and exit")
    add_flags(p)


def values(args: Namespace | None) -> tuple[str, dict[str, str]]:
    """Return a sentence about the defaults in --help, and the note on each setting's value.

    args: the other flags on the command line; None if there are none, or they are refused
    """
    refusal = ""
    try:
        preset = default_presets(args)[-1] if args else "nano"
        settings = resolve(vars(args) if args else {}, args and args.config, preset)
    except UsageError as error:
        args, refusal = None, f" The other flags have no effect here: {error.with_flags()}."
        settings = resolve({}, None, "nano")
    taken = settings.train.preset
    whose = f"The defaults shown are those of --preset {taken}"
    if "preset" not in settings.given:
        other = {"nano": "on a CPU (on a GPU: tiny)", "tiny": "on a GPU (on a CPU: nano)"}[taken]
        whose += f", which is used {other}"
    if args and args.config:
        whose += f", and the settings of {args.config}"
    if args and args.resume is not None:
        whose += "; a resumed run keeps its own settings"
    return f"{whose}.{refusal}", notes(settings)


def check(args: Namespace) -> None:
    """Raise UsageError if the flags do not fit together, without importing torch."""
    if args.resume is not None:
        if args.resume == "":
            raise UsageError("--resume is empty; name a run, or give --resume alone for the newest")
        if args.device is not None:
            cli.check_device(args.device)
        if args.resume is not NEWEST and not Path(args.resume).expanduser().exists():
            raise UsageError(f"{args.resume}: no such run")
        if args.overwrite or args.resume is not NEWEST and is_elsewhere(args.out, args.resume):
            raise UsageError(ELSEWHERE)
        return
    found: list[Settings | UsageError] = []
    for preset in default_presets(args):
        try:
            found.append(resolve(vars(args), args.config, preset))
        except UsageError as error:
            found.append(error)
    refusals = [each for each in found if isinstance(each, UsageError)]
    # If the preset depends on the device, only errors that both presets have are raised here.
    if len(refusals) == len(found) and len({str(error) for error in refusals}) == 1:
        raise refusals[0]
    settings = next((each for each in found if isinstance(each, Settings)), None)
    if settings is not None:
        cli.check_device(settings.train.device)
    if settings is not None and (data := settings.train.data):
        for place in [data] if isinstance(data, str) else data:
            if not Path(place).exists():
                documents.find([place])


def is_elsewhere(out: str | None, run: str | Path) -> bool:
    """Return whether --out names another folder than that of the run to resume.

    out: value of --out, or None
    run: the run
    """
    there = Path(run).is_dir() and Path(out or "").resolve() == Path(run).resolve()
    return bool(out) and not there


def default_presets(args: Namespace) -> list[str]:
    """Return the preset without --preset: nano on a CPU, tiny on a GPU; both if it is unknown."""
    device = args.device
    if device is None and args.config is not None:
        device = read_config(Path(args.config)).get("device")
    if (device or "auto") != "auto":
        return ["nano" if device.startswith("cpu") else "tiny"]
    if sys.platform == "linux" and not any(Path(name).exists() for name in GPU_FILES):
        return ["nano"]
    return ["nano", "tiny"]
