"""Merge the layers of a configuration: defaults < --preset < --config FILE < command line."""

from collections.abc import Collection
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from minillm.config.config_files import is_complete, read_config
from minillm.config.flags import Settings, all_flags
from minillm.config.train import PRESETS, ModelConfig, TrainConfig
from minillm.errors import CorruptError, UsageError
from minillm.runtime import relative_paths as places

# What may change when a run is resumed: how it runs and reports, and how long, but not what it is.
RESUMABLE = frozenset(
    "data val cache_dir device threads zero offload rank_timeout hang_timeout kernels compile"
    " activation_checkpointing steps epochs time_limit early_stop log_every eval_every eval_batches"
    " final_eval_batches sample_every sample_prompt save_every keep_last keep_best".split()
)  # fmt: skip

# How text is prepared, which a prepared folder has settled; and which text it is.
PREPARED = frozenset("tokenizer val_fraction val errors encoding text_column".split())
OF_TEXT = PREPARED | {"data"}

# How long a run is. The ones that are given replace all of those that it had.
LENGTHS = frozenset(("steps", "epochs", "time_limit"))

# Settings of a complete --config file that another value of one on the command line replaces: the
# vocabulary of another tokenizer, and the number of blocks of another core.
REPLACED = {"tokenizer": "vocab_size", "recurrent": "n_layer"}

# What means something only with --recurrent.
OF_A_CORE = frozenset(
    "injection start_state recurrence_style mean_recurrence max_recurrence backprop_depth"
    " recurrence_groups recurrence_curriculum".split()
)


def resolve(
    flags: dict[str, Any],
    config_file: str | None,
    default_preset: str | None,
    base: dict[str, Any] | None = None,
) -> Settings:
    """Merge the layers. flags: name -> value, None where the user gave none.

    base: what stands in for the defaults, such as the settings of a run to resume.
    Raises UsageError on an unknown key, a wrong type or settings that do not fit together.
    """
    given = {
        name: value for name, value in flags.items() if name in all_flags() and value is not None
    }
    from_file = read_config(Path(config_file)) if config_file is not None else {}
    if is_complete(from_file):
        names = REPLACED.keys() & given.keys()
        replaced = {REPLACED[name] for name in names if given[name] != from_file.get(name)}
        own = _own_wishes(from_file, default_preset, "init_from" in given)
        from_file = {name: value for name, value in own.items() if name not in replaced}
    user = {**from_file, **given}
    kept = LENGTHS & given.keys() or LENGTHS & from_file.keys()
    model, train = _merged(user, default_preset, base or {}, kept)
    if train.init_from is None:  # else the model is that run's: startup looks at what is given
        _check_recurrence(model, user, config_file, frozenset(given), base is not None)
    return Settings(model, train, frozenset(user))


def _merged(
    user: dict[str, Any], default_preset: str | None, base: dict[str, Any], kept: frozenset[str]
) -> tuple[ModelConfig, TrainConfig]:
    """Return what the settings of the user, over a preset and `base`, come to.

    kept: the lengths of the user's that count; where there are any, all others are None.
    """
    preset = user.get("preset") or default_preset
    chosen = dict(PRESETS[preset]) if preset else {}
    if "recurrent" in user and "init" not in user:
        chosen.pop("init", None)  # it was tuned for fixed depth; a core has its own
    if user.get("init_from"):
        chosen.pop("recurrent", None)  # the model, and with it the core, is that run's
    values = {**base, **chosen, **user, "preset": preset}
    # What the user says about the length replaces all that the preset says about it.
    if kept:
        values.update(dict.fromkeys(LENGTHS - kept))
    if "learning_rate" in values and "min_learning_rate" not in user:
        # The end follows the peak, in the proportion that the preset or the default has.
        rates = {f.name: f.default for f in fields(TrainConfig)} | PRESETS.get(preset, {})
        share = rates["min_learning_rate"] / rates["learning_rate"]
        values["min_learning_rate"] = share * values["learning_rate"]
    model_names = {f.name for f in fields(ModelConfig)}
    model = ModelConfig(**{n: v for n, v in values.items() if n in model_names})
    train = TrainConfig(**{n: v for n, v in values.items() if n not in model_names})
    return model, train


def _own_wishes(
    stated: dict[str, Any], default_preset: str | None, other_weights: bool
) -> dict[str, Any]:
    """Return the settings of a complete file without those that follow from the others.

    They are its preset's, defaults, or derived from others, as the last learning rate is from the
    first. Left out, they follow what the command line changes.

    other_weights: whether the command line names another run to start from, whose model and
    tokenizer take the place of those that the file's --init-from has fixed.
    """

    def follow(names: frozenset[str]) -> bool:
        rest = {name: value for name, value in stated.items() if name not in names}
        try:
            both = _merged(rest, default_preset, {}, LENGTHS & rest.keys())
        except UsageError:  # some of the others cannot do without it
            return False
        found = asdict(both[0]) | asdict(both[1])
        return all(found[name] == stated.get(name) for name in names)

    groups = [LENGTHS, *(frozenset([name]) for name in stated.keys() - LENGTHS - {"preset"})]
    idle = {name for names in groups if follow(names) for name in names}
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
    """Raise UsageError on settings of a core that there is not, or of other blocks than it has.

    user: settings from the file and, where `flags` names them, the command line.    resumed: what a
    run to resume may not change is refused by `changed`.
    """

    def named(name: str) -> str:
        return f"--{name.replace('_', '-')}" if name in flags else f"{file}: {name}"

    if model.recurrent is None:
        idle = meant_for_a_core(user)
        if idle and not resumed:
            raise UsageError(f"{named(idle[0])} is of recurrent depth; add --recurrent P,R,C")
        return
    if user.get("n_layer", model.n_layer) != model.n_layer:
        raise UsageError(
            f"{named('n_layer')} {user['n_layer']}: --recurrent {model.recurrent} is "
            f"{model.n_layer} blocks; leave it out"
        )
    if user.get("qk_norm") is False and model.qk_norm:
        raise UsageError(
            f"{'--no-qk-norm' if 'qk_norm' in flags else named('qk_norm') + ' false'}: "
            f"--recurrence-style {model.recurrence_style} is with QK-norm; leave it out"
        )


def meant_for_a_core(user: dict[str, Any]) -> list[str]:
    """The names of settings that mean something only with recurrent depth, and differ from what
    they are without.
    """
    named = sorted(user.keys() & OF_A_CORE)
    return [name for name in named if user[name] != all_flags()[name].default]


def changed(
    model: ModelConfig,
    train: TrainConfig,
    settings: Settings,
    outcomes: dict[str, Collection[Any]] | None = None,
) -> Settings:
    """Return the settings of a run to resume, with what `settings.given` may change of them.

    outcomes: setting -> other values that mean what the run has: what was asked for where `model`
    has what came of it, or what came of it where `train` has what was asked for.
    Raises UsageError, naming the flag, on a given setting that a resumed run cannot change.
    """
    wishes, flat = {}, settings.flat()
    for name in sorted(settings.given):
        if name in RESUMABLE:
            wishes[name] = flat[name]
            continue
        old = getattr(train, name, None) if hasattr(train, name) else getattr(model, name)
        known = flat[name] in (outcomes or {}).get(name, ())
        if not known and not places.equal(name, flat[name], old):
            raise UsageError(
                f"--{name.replace('_', '-')} {flat[name]} differs from the run's {old} and cannot "
                "change on --resume; start anew with --init-from"
            )
    # What is said of the text as it was: the corpus that was made from it will do.
    given = OF_TEXT & settings.given
    text = {name for name in given if places.equal(name, flat[name], getattr(train, name))}
    if wishes.keys() & LENGTHS:
        wishes = {**dict.fromkeys(LENGTHS), **wishes}
    return Settings(model, replace(train, **wishes), settings.given - text)


def without_first_lengths(settings: Settings, first: dict[str, Any]) -> Settings:
    """Return `settings`, less the lengths of a --config file that the run has had from its start.

    first: the settings of training that its config.json states. Such a file says how long the run
    was to be, and asks for nothing more.
    """
    lengths = LENGTHS & settings.given
    if any(getattr(settings.train, name) != first.get(name) for name in lengths):
        return settings
    return replace(settings, given=settings.given - lengths)


def as_train_config(run: Path, train: dict) -> TrainConfig:
    """The settings of training that a run's files state; CorruptError if they cannot be."""
    try:
        return TrainConfig(**train)
    except (TypeError, UsageError) as error:
        raise CorruptError(f"{run}: config.json, or state.json of a checkpoint: {error}") from None


def as_of(
    settings: Settings, state: dict[str, Any], folder: Path, launch: str | None = None
) -> Settings:
    """Return the settings to resume with: the user's, all others as a checkpoint has saved them.

    state: the checkpoint's state.json. It is not always the newest checkpoint's, by which the
    command line was read: the newest may be damaged.
    folder: the checkpoint, for error messages.
    launch: torchrun's name. It starts a launch again with the same flags; the lengths among them
    were applied by the attempt that saved the checkpoint, and are not applied to it once more.
    """
    then, given = places.found(folder.parent.parent, state["settings"]), settings.given
    if launch is not None and state.get("launch") == launch:
        given -= LENGTHS
    kept = given | LENGTHS if given & LENGTHS else given
    if unknown := sorted(then.keys() - RESUMABLE):
        raise CorruptError(f"{folder}/state.json: cannot change {unknown[0]!r}")
    own = {name: value for name, value in then.items() if name not in kept}
    train = as_train_config(folder, asdict(settings.train) | own)
    return Settings(settings.model, train, given)
