"""Merge the layers of a configuration: defaults < --preset < --config FILE < command line."""

import json
import tomllib
from argparse import ArgumentTypeError
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any

from minillm.cli import nearest
from minillm.config import PRESETS, ModelConfig, TrainConfig
from minillm.errors import CorruptError, UsageError
from minillm.settings import ALIASES, Settings, all_flags, kind_of, parser_of

# What may change when a run is resumed: how it runs and reports, and how long, but not what it is.
RESUMABLE = frozenset(
    "data val cache_dir device threads zero offload rank_timeout hang_timeout kernels compile"
    " activation_checkpointing steps epochs time_limit early_stop log_every eval_every eval_batches"
    " final_eval_batches sample_every sample_prompt save_every keep_last keep_best".split()
)  # fmt: skip

# How long a run is. The ones that are given replace all of those that it had.
LENGTHS = frozenset(("steps", "epochs", "time_limit"))

# What means something only with --recurrent.
OF_A_CORE = frozenset(
    "injection start_state recurrence_style mean_recurrence max_recurrence backprop_depth"
    " recurrence_groups recurrence_curriculum".split()
)

NAMED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


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
    user = {**from_file, **given}
    preset = user.get("preset") or default_preset
    chosen = dict(PRESETS[preset]) if preset else {}
    if "recurrent" in user and "init" not in user:
        chosen.pop("init", None)  # it was tuned for fixed depth; a core has its own
    if user.get("init_from"):
        chosen.pop("recurrent", None)  # the model, and with it the core, is that run's
    values = {**(base or {}), **chosen, **user, "preset": preset}
    # What the user says about the length replaces all that the preset says about it.
    if LENGTHS & user.keys():
        kept = LENGTHS & given.keys() or LENGTHS & from_file.keys()
        values.update(dict.fromkeys(LENGTHS - kept))
    if "learning_rate" in values and "min_learning_rate" not in user:
        # The end follows the peak, in the proportion that the preset or the default has.
        rates = {f.name: f.default for f in fields(TrainConfig)} | PRESETS.get(preset, {})
        share = rates["min_learning_rate"] / rates["learning_rate"]
        values["min_learning_rate"] = share * values["learning_rate"]
    model_names = {f.name for f in fields(ModelConfig)}
    model = ModelConfig(**{n: v for n, v in values.items() if n in model_names})
    train = TrainConfig(**{n: v for n, v in values.items() if n not in model_names})
    if train.init_from is None:  # else the model is that run's: startup looks at what is given
        _check_recurrence(model, user, config_file, frozenset(given), base is not None)
    return Settings(model, train, frozenset(user))


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


def changed(model: ModelConfig, train: TrainConfig, settings: Settings) -> Settings:
    """The settings of a run to resume, with what `settings.given` may change of them.

    Raises UsageError, naming the flag, on a given setting that a resumed run cannot change.
    """
    wishes = {}
    for name in sorted(settings.given):
        if name not in RESUMABLE:
            old = getattr(train, name, None) if hasattr(train, name) else getattr(model, name)
            new = settings.flat()[name]
            if new != old:
                raise UsageError(
                    f"--{name.replace('_', '-')} {new} differs from the run's {old} and cannot "
                    "change on --resume; start anew with --init-from"
                )
        else:
            wishes[name] = getattr(settings.train, name)
    if wishes.keys() & LENGTHS:
        wishes = {**dict.fromkeys(LENGTHS), **wishes}
    return Settings(model, replace(train, **wishes), settings.given)


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
    then, given = state["settings"], settings.given
    if launch is not None and state.get("launch") == launch:
        given -= LENGTHS
    kept = given | LENGTHS if given & LENGTHS else given
    if unknown := sorted(then.keys() - RESUMABLE):
        raise CorruptError(f"{folder}/state.json: cannot change {unknown[0]!r}")
    own = {name: value for name, value in then.items() if name not in kept}
    train = as_train_config(folder, asdict(settings.train) | own)
    return Settings(settings.model, train, given)


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a .toml or .json file: one flat table, names with dashes or underscores.

    Raises UsageError, naming file and key, on what is not a setting or not of its type.
    """
    raw = _parse_file(path)
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected one table of settings, got {type(raw).__name__}")
    settings: dict[str, Any] = {}
    for key, value in raw.items():
        flag = "--" + key.replace("_", "-")
        name = ALIASES.get(flag, flag)[2:].replace("-", "_")
        if name not in all_flags():
            near = nearest(name, all_flags())
            hint = f"; did you mean {near}?" if near else ""
            raise UsageError(f"{path}: unknown setting {key!r}{hint}")
        if name in settings:
            raise UsageError(f"{path}: {name} is given twice")
        if value is not None:
            settings[name] = _typed(path, key, value, all_flags()[name])
    return settings


def _parse_file(path: Path) -> Any:
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise UsageError(f"--config {path}: {what}; expected a .toml or .json file")
    if path.stat().st_size > 1 << 20:
        raise UsageError(f"--config {path}: larger than 1 MiB; is this a configuration?")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_refuse_repeats, parse_constant=_refuse_nan)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's own advice is of no use here
            raise UsageError(f"{path}: a number has too many digits") from None
        raise UsageError(f"{path}: {error}") from None
    raise UsageError(f"--config {path}: expected a .toml or .json file")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return table


def _refuse_nan(text: str) -> None:
    raise ValueError(f"{text} is not a finite number")


def _typed(path: Path, key: str, value: Any, f: Field) -> Any:
    kind = kind_of(f)
    if f.metadata.get("many") and isinstance(value, list) and value:
        return tuple(_typed(path, key, part, f) for part in value)
    if f.name in ("threads", "micro_batch_size") and type(value) is int:
        value = str(value)
    if f.name == "time_limit" and type(value) in (int, float):
        value = str(value)
    fits = type(value) is kind or (kind is float and type(value) in (int, str) and (
        type(value) is int or "parse" in f.metadata))  # fmt: skip
    if not fits:
        raise UsageError(
            f"{path}: {key} = {json.dumps(value, default=str)} is a {type(value).__name__}, "
            f"expected {NAMED[kind]}"
        )
    if kind is str and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise UsageError(f"{path}: {key} holds a NUL or half a character")
    if kind in (bool, str) and "choices" not in f.metadata:
        return value
    try:
        return parser_of(f)(str(value))
    except ArgumentTypeError as error:
        raise UsageError(f"{path}: {key}: {error}") from None
