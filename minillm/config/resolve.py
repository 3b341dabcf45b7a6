"""Merge the layers of a configuration: defaults < --preset < --config FILE < command line.

`resolve` does that for a new run. For a run to resume, `resumed_settings` applies the user's
changes and `settings_at_checkpoint` takes the rest from the checkpoint.
"""

from collections.abc import Collection
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from minillm.config.config_files import is_complete, read_config
from minillm.config.flags import Settings, setting_fields
from minillm.config.train import PRESETS, ModelConfig, TrainConfig
from minillm.errors import CorruptError, UsageError, parameter
from minillm.runtime import relative_paths

# Settings that --resume may change: how the run is executed and reported, and how long it is.
RESUMABLE = frozenset(f.name for f in fields(TrainConfig) if f.metadata.get("resumable"))

# Settings that say how text is prepared, which a prepared folder has fixed; and the text itself.
PREPARED = frozenset(f.name for f in fields(TrainConfig) if f.metadata.get("prepares"))
TEXT = PREPARED | {"data"}

# Settings of the length of a run. If one of them is given, it replaces all that the run had.
LENGTHS = frozenset(("steps", "epochs", "time_limit"))

# A flag with another value than a complete --config file replaces a second setting of that file:
# another tokenizer has another vocabulary, and another core another number of blocks.
REPLACED = {"tokenizer": "vocab_size", "recurrent": "n_layer"}

# Settings that have a meaning only with --recurrent.
RECURRENCE = frozenset(
    "injection start_state recurrence_style mean_recurrence max_recurrence backprop_depth"
    " recurrence_groups recurrence_curriculum".split()
)


def resolve(
    flags: dict[str, Any],
    config_file: str | None,
    default_preset: str | None,
    base: dict[str, Any] | None = None,
) -> Settings:
    """Return the settings that result from the layers of a configuration.

    flags: value of each flag by its name, None where the user gave none; other names are ignored
    config_file: path of the --config file, or None
    default_preset: preset to use if neither a flag nor the file names one; None for no preset
    base: values in place of the defaults, such as the settings of a run to resume
    Raises UsageError on an unknown key, a wrong type or settings that do not fit together.
    """
    known = setting_fields()
    given = {n: value for n, value in flags.items() if n in known and value is not None}
    from_file = read_config(Path(config_file)) if config_file is not None else {}
    if is_complete(from_file):
        names = REPLACED.keys() & given.keys()
        replaced = {REPLACED[name] for name in names if given[name] != from_file.get(name)}
        own = _without_derived(from_file, default_preset, "init_from" in given)
        from_file = {name: value for name, value in own.items() if name not in replaced}
    user = {**from_file, **given}
    kept = LENGTHS & given.keys() or LENGTHS & from_file.keys()
    model, train = _merged(user, default_preset, base or {}, kept)
    if train.init_from is None:  # else training/setup.py checks, as the model is that run's
        _check_recurrence(model, user, config_file, frozenset(given), base is not None)
    return Settings(model, train, frozenset(user))


def _merged(
    user: dict[str, Any], default_preset: str | None, base: dict[str, Any], kept: frozenset[str]
) -> tuple[ModelConfig, TrainConfig]:
    """Return the two configurations with the user's settings over a preset and `base`.

    user: settings from flags and file
    default_preset: preset to use if the user names none
    base: values in place of the defaults
    kept: the lengths that the user gave; if there are any, all others become None
    """
    preset = user.get("preset") or default_preset
    chosen = dict(PRESETS[preset]) if preset else {}
    if "recurrent" in user and "init" not in user:
        chosen.pop("init", None)  # the preset's was tuned for fixed depth
    if user.get("init_from"):
        chosen.pop("recurrent", None)  # the model, and so the core, is that run's
    values = {**base, **chosen, **user, "preset": preset}
    # A length that the user gives replaces all lengths of the preset.
    if kept:
        values.update(dict.fromkeys(LENGTHS - kept))
    if "learning_rate" in values and "min_learning_rate" not in user:
        # The last learning rate follows the peak, in the preset's or the default's proportion.
        rates = {f.name: f.default for f in fields(TrainConfig)} | PRESETS.get(preset, {})
        share = rates["min_learning_rate"] / rates["learning_rate"]
        values["min_learning_rate"] = share * values["learning_rate"]
    model_names = {f.name for f in fields(ModelConfig)}
    model = ModelConfig(**{n: v for n, v in values.items() if n in model_names})
    train = TrainConfig(**{n: v for n, v in values.items() if n not in model_names})
    return model, train


def _without_derived(
    stated: dict[str, Any], default_preset: str | None, other_weights: bool
) -> dict[str, Any]:
    """Return the settings of a complete file without those that follow from the others.

    Those are its preset's, defaults, or derived from others, as the last learning rate is derived
    from the peak. Left out, they follow the changes of the command line.

    stated: the settings in the file
    default_preset: preset to use if the file names none
    other_weights: True if the command line names another run to start from. Its model and
        tokenizer replace those that the file's own --init-from had fixed.
    """

    def is_derived(names: frozenset[str]) -> bool:
        rest = {name: value for name, value in stated.items() if name not in names}
        try:
            both = _merged(rest, default_preset, {}, LENGTHS & rest.keys())
        except UsageError:  # the other settings are not valid without these
            return False
        found = asdict(both[0]) | asdict(both[1])
        return all(found[name] == stated.get(name) for name in names)

    groups = [LENGTHS, *(frozenset([name]) for name in stated.keys() - LENGTHS - {"preset"})]
    idle = {name for names in groups if is_derived(names) for name in names}
    if other_weights and "init_from" in stated:
        idle |= {f.name for f in fields(ModelConfig)} | {"tokenizer"}
    return {name: value for name, value in stated.items() if name not in idle}


def _check_recurrence(
    model: ModelConfig,
    user: dict[str, Any],
    file: str | None,
    flags: frozenset[str],
    resumed: bool,
) -> None:
    """Raise UsageError on recurrence settings without recurrence, or on contradictory ones.

    model: the configuration that results
    user: settings from the file and the command line
    file: path of the --config file, or None
    flags: names of the settings that are from the command line
    resumed: True for a run to resume, for which `resumed_settings` refuses changes
    """

    def named(name: str) -> str:
        return parameter(name) if name in flags else f"{file}: {name}"

    if model.recurrent is None:
        idle = recurrence_settings(user)
        if idle and not resumed:
            raise UsageError(
                f"{named(idle[0])} needs a recurrent model; add {parameter('recurrent')} P,R,C"
            )
        return
    if user.get("n_layer", model.n_layer) != model.n_layer:
        raise UsageError(
            f"{named('n_layer')} {user['n_layer']}: {parameter('recurrent')} {model.recurrent} has "
            f"{model.n_layer} blocks; leave it out"
        )
    if user.get("qk_norm") is False and model.qk_norm:
        raise UsageError(
            f"{named('qk_norm')} false: {parameter('recurrence_style')} {model.recurrence_style} "
            "has QK-norm; leave it out"
        )


def recurrence_settings(user: dict[str, Any]) -> list[str]:
    """Return the names of settings that need a recurrent model and are not at their defaults."""
    known = setting_fields()
    return [n for n in sorted(user.keys() & RECURRENCE) if user[n] != known[n].default]


def resumed_settings(
    model: ModelConfig,
    train: TrainConfig,
    settings: Settings,
    outcomes: dict[str, Collection[Any]] | None = None,
) -> Settings:
    """Return the settings of a run to resume, changed by the settings that the user gave.

    model: the run's configuration of the model
    train: the run's configuration of the training
    settings: the user's settings, of which only `settings.given` count
    outcomes: setting -> other values that mean the same as the run's. They are the requested value
        if `model` has the resulting one, and the resulting one if `train` has the requested one.
    Raises UsageError, which names the flag, on a setting that a resumed run cannot change.
    """
    changes, flat = {}, settings.flat()
    for name in sorted(settings.given):
        if name in RESUMABLE:
            changes[name] = flat[name]
            continue
        old = getattr(train, name, None) if hasattr(train, name) else getattr(model, name)
        known = flat[name] in (outcomes or {}).get(name, ())
        if not known and not relative_paths.equal(name, flat[name], old):
            raise UsageError(
                f"{parameter(name)} {flat[name]} differs from the run's {old} and cannot change on "
                f"{parameter('resume')}; start a new run with {parameter('init_from')}"
            )
    # If a setting of the text is given unchanged, the corpus made from it can be used as it is.
    given = TEXT & settings.given
    text = {name for name in given if relative_paths.equal(name, flat[name], getattr(train, name))}
    if changes.keys() & LENGTHS:
        changes = {**dict.fromkeys(LENGTHS), **changes}
    return Settings(model, replace(train, **changes), settings.given - text)


def without_first_lengths(settings: Settings, first: dict[str, Any]) -> Settings:
    """Return the settings without the lengths of a --config file if the run began with them.

    Such a file says how long the run was meant to be. It does not ask for a longer one.

    settings: the user's settings
    first: the settings of training in the run's config.json
    """
    lengths = LENGTHS & settings.given
    if any(getattr(settings.train, name) != first.get(name) for name in lengths):
        return settings
    return replace(settings, given=settings.given - lengths)


def as_train_config(run: Path, train: dict) -> TrainConfig:
    """Return the configuration of training that a run's files state.

    run: folder of the run, for the message
    train: settings by name
    Raises CorruptError if they are not valid.
    """
    try:
        return TrainConfig(**train)
    except (TypeError, UsageError) as error:
        raise CorruptError(f"{run}: config.json, or state.json of a checkpoint: {error}") from None


def settings_at_checkpoint(
    settings: Settings, state: dict[str, Any], folder: Path, launch: str | None = None
) -> Settings:
    """Return the settings to resume with: the user's, all others as saved in the checkpoint.

    settings: settings that the command line and the newest checkpoint gave. The newest one may be
        damaged, and then an older one is resumed.
    state: content of the checkpoint's state.json
    folder: folder of the checkpoint, for error messages
    launch: torchrun's name of the launch. After a failure torchrun starts the launch again with
        the same flags. The lengths among them were already applied by the attempt that saved the
        checkpoint, and are not applied again.
    """
    then, given = relative_paths.found(folder.parent.parent, state["settings"]), settings.given
    if launch is not None and state.get("launch") == launch:
        given -= LENGTHS
    kept = given | LENGTHS if given & LENGTHS else given
    if unknown := sorted(then.keys() - RESUMABLE):
        raise CorruptError(f"{folder}/state.json: cannot change {unknown[0]!r}")
    own = {name: value for name, value in then.items() if name not in kept}
    train = as_train_config(folder, asdict(settings.train) | own)
    return Settings(settings.model, train, given)
