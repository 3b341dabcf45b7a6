"""The command line of train.py."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from minillm import cli, documents
from minillm.configure import read_config, resolve
from minillm.errors import UsageError
from minillm.settings import ALIASES, Settings, add_flags

NEWEST = object()  # --resume without a name
# The device files of CUDA's driver, of the same in WSL and on a Jetson, and of ROCm's.
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/kfd")


def parse(argv: Sequence[str]) -> Namespace:
    """Parse train.py's flags; raise UsageError on what can be refused without torch."""
    args = parser().parse(argv)
    check(args)
    return args


def parser(description: str = "Train a decoder on text.") -> cli.Parser:
    """The parser of train.py's flags."""
    names = ", ".join(f"{theirs} = {ours}" for theirs, ours in ALIASES.items())
    p = cli.Parser(
        prog="train.py",
        description=description,
        epilog="The defaults shown hold without a preset; --preset NAME --print-config shows a "
        "preset's. Switches are turned off with --no-NAME. Underscores may stand for dashes, and "
        f"nanoGPT's names for ours: {names}.",
        aliases=ALIASES,
    )
    p.add_argument("--config", metavar="FILE", help="settings from a .toml or .json file")
    p.add_argument(
        "--resume", nargs="?", const=NEWEST, metavar="RUN", help="go on with RUN, or the newest run"
    )
    p.add_argument(
        "--print-config", action="store_true", help="print the settings as --config takes them"
    )
    add_flags(p)
    return p


def check(args: Namespace) -> None:
    """Raise UsageError if the flags do not fit together, without asking torch for a device."""
    if args.resume is not None:
        if args.out or args.init_from or args.overwrite:
            raise UsageError("--resume goes on in its own folder; drop --out, --init-from and such")
        if args.resume == "":
            raise UsageError("--resume is empty; name a run, or give --resume alone for the newest")
        return
    found: list[Settings | UsageError] = []
    for preset in default_presets(args):
        try:
            found.append(resolve(vars(args), args.config, preset))
        except UsageError as error:
            found.append(error)
    refusals = [each for each in found if isinstance(each, UsageError)]
    # Where the preset is not known yet, only what both refuse in the same words is refused here.
    if len(refusals) == len(found) and len({str(error) for error in refusals}) == 1:
        raise refusals[0]
    settings = next((each for each in found if isinstance(each, Settings)), None)
    if settings is not None and (data := settings.train.data):
        for place in [data] if isinstance(data, str) else data:
            if not Path(place).exists():
                documents.find([place])


def default_presets(args: Namespace) -> list[str]:
    """Return the preset used without --preset: nano on a CPU, tiny on a GPU; both if in doubt."""
    device = args.device
    if device is None and args.config is not None:
        device = read_config(Path(args.config)).get("device")
    if (device or "auto") != "auto":
        return ["nano" if device.startswith("cpu") else "tiny"]
    if sys.platform == "linux" and not any(Path(name).exists() for name in GPU_FILES):
        return ["nano"]
    return ["nano", "tiny"]
