"""Turn the command line of train.py into the settings of a new run, or of one to resume."""

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

from minillm.checkpoint import placing
from minillm.checkpoint.run_folder import RunFolder, run_of_launch
from minillm.config.config_files import read_config
from minillm.config.flags import Settings
from minillm.config.resolve import as_train_config, recurrence_settings, resolve
from minillm.errors import UsageError, parameter
from minillm.runtime import device, relative_paths
from minillm.runtime.files import check_place
from minillm.runtime.json_text import json_text
from minillm.runtime.launch import World
from minillm.training.resuming import resumed

# Fields of the model that --init-from does not fix: they set how often its core runs.
DEPTHS = {"mean_recurrence", "max_recurrence", "backprop_depth"}


def begin(
    args: Namespace, world: World, preset: str | None = None
) -> tuple[Settings, RunFolder | None]:
    """Return the settings of the run and, if one is resumed, its folder.

    args: flags as flags.train parses them; None where a flag was not given
    world: place of this process in the launch. If torchrun has restarted a launch that has saved a
        checkpoint, the run of that launch is resumed, regardless of the flags.
    preset: preset to use if none is named; None: the one that fits the device of this machine

    Raises UsageError if the flags do not fit together, or --out is in use.
    """
    if args.resume is not None:
        return resumed(args)
    settings = resolve(vars(args), args.config, preset or _preset_for_device(args))
    train = settings.train
    if world.attempt and (run := run_of_launch(world.launch, train.out)) is not None:
        return _restarted(settings, run), run
    if train.init_from:
        settings = _inherit(settings, RunFolder(train.init_from))
    if train.out and world.rank == 0:
        sources = placing.sources(settings, args.config)
        placing.check_out(Path(train.out), train.overwrite, world.launch, sources)
    for name, place in (("out", train.out or "runs"), ("cache_dir", train.cache_dir)):
        check_place(name, Path(place))
    return settings, None


def _preset_for_device(args: Namespace) -> str:
    """Return the preset to use where none is named: nano on a CPU, tiny on a GPU."""
    wish = args.device
    if wish is None and args.config is not None:
        wish = read_config(Path(args.config)).get("device")
    return "nano" if device.pick_device(wish or "auto").type == "cpu" else "tiny"


def _restarted(settings: Settings, run: RunFolder) -> Settings:
    """Return the settings of a run that torchrun has restarted, with those of its checkpoint."""
    past = run.train | run.newest_settings()
    # The command line names the places as they are seen from here; the files of the run may not.
    names = relative_paths.PATHS[:-1]
    past |= {name: x for name in names if (x := getattr(settings.train, name, None))}
    return Settings(run.model, as_train_config(run.path, past), frozenset())


def _inherit(settings: Settings, source: RunFolder) -> Settings:
    """Return `settings` with the model's shape and the tokenizer of the run `source`.

    The recurrence may be set. If its mean is set, the settings derived from it follow the new mean.

    Raises UsageError on settings that differ from those that `source` fixes, and on recurrence
    settings if it has no core.
    """
    model = source.model
    fixed = (asdict(model).keys() | {"tokenizer"}) - DEPTHS - {"dropout"}
    tokenizer = str(source.tokenizer_file)
    own = {name: [value] for name, value in asdict(model).items()}
    own["vocab_size"].append(source.facts["asked_vocab_size"])
    own["tokenizer"] = [tokenizer, source.train.get("tokenizer")]
    given = {name: value for name, value in settings.flat().items() if name in settings.given}
    for name in sorted(fixed & given.keys()):
        if not any(relative_paths.equal(name, given[name], value) for value in own[name]):
            raise UsageError(
                f"{parameter(name)} cannot be set with {parameter('init_from')}: {source} fixes it"
            )
    idle = recurrence_settings(given)
    if idle and model.recurrent is None:
        raise UsageError(
            f"{parameter(idle[0])} sets the recurrence; {source} has no core that is run "
            "repeatedly; leave it out"
        )
    wished = {name: given[name] for name in DEPTHS & given.keys()}
    derived = ["max_recurrence", "backprop_depth"] if "mean_recurrence" in wished else []
    if "max_recurrence" in wished:
        derived.append("backprop_depth")
    wished = {**dict.fromkeys(derived), **wished, "dropout": settings.model.dropout}
    train = replace(settings.train, tokenizer=tokenizer)
    return Settings(replace(model, **wished), train, settings.given - fixed)


def config_text(settings: Settings) -> str:
    """Return the settings as JSON that --config reads."""
    stated = {k: relative_paths.as_text(v) for k, v in settings.flat().items() if v is not None}
    return json_text(stated, indent=1)
