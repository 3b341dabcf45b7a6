"""A run folder: its name, its config.json and its tokenizer.

    runs/NAME/config.json, tokenizer.model|json, metrics.jsonl, samples.txt, checkpoints/

Checkpoints are read in checkpoint.py and written in saving.py.
"""

from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from minillm.checkpoint import not_a_run
from minillm.checkpoint.discarding import ASIDE, STEP, is_of_others
from minillm.checkpoint.read import read_state, stamp_of
from minillm.config.train import ModelConfig
from minillm.data.tokenizer import Tokenizer, load_tokenizer
from minillm.errors import CorruptError, UsageError
from minillm.runtime import relative_paths as places
from minillm.runtime.files import file_digest, read_json, write_json
from minillm.runtime.launch import shell_command
from minillm.runtime.ownership import CORPUS, RUN, claims, is_run

TRIES = 20  # looks at a run whose checkpoints are replaced while they are read


def newest_run(root: Path = Path("runs"), begun: bool = False) -> Path:
    """The run in `root` whose newest checkpoint is the newest; begun: those that have none count
    from their start. UsageError if there is none.
    """
    found = []
    for run in root.glob("*"):
        if not claims(run, RUN):
            continue
        when = _newest_sign(run, begun)
        if when is not None:
            found.append((when, run))
    if not found:
        raise UsageError(
            f"no run with a checkpoint in {root}/; train one with: {shell_command('train')}"
        )
    return max(found)[1]


def _newest_sign(run: Path, begun: bool) -> int | None:
    """Return when the newest checkpoint of a run was made, or the run, in ns; None: neither is."""
    for _ in range(TRIES):
        signs = [*checkpoints_of(run).values(), *(run.glob("config.json") if begun else ())]
        with suppress(FileNotFoundError):  # a training has deleted it since it was listed
            if signs or not step_folders(run):
                return max((path.stat().st_mtime_ns for path in signs), default=None)
    return None


def run_of(launch: str | None, out: str | None) -> Path | None:
    """The run with a checkpoint that torchrun's `launch` has begun: `out`, or in runs/."""
    places = [Path(out)] if out else sorted(Path("runs").glob("*"))
    return next((run for run in places if checkpoints_of(run) and is_of(run, launch)), None)


def is_of(run: Path, launch: str | None) -> bool:
    """Return whether a run is one that torchrun's `launch` has begun."""
    if launch is None or not is_run(run):  # one of many runs may be damaged: not this launch's
        return False
    return read_json(run / "config.json").get("launch") == launch


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The folders of a run's whole checkpoints, by step."""
    return {step: f for step, f in step_folders(run).items() if (f / "manifest.json").exists()}


def step_folders(run: Path) -> dict[int, Path]:
    """Return the folders that were a run's checkpoints, by step, whatever has become of them.

    One that is put aside to be replaced counts until the new one has the name. A folder without a
    file of a checkpoint in it is of others, and does not count.
    """
    for _ in range(TRIES):
        folders = [f for f in run.glob("checkpoints/*") if f.is_dir() and not is_of_others(f)]
        found = {
            int(m[1]): f
            for names in (ASIDE, STEP)
            for f in folders
            if (m := names.fullmatch(f.name))
        }
        # A training that deletes the last one while it saves the next may hide both.
        if found or not any(run.glob("checkpoints/*step-*")):
            break
    return found


def folder_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint of one step, as it is or as it will be."""
    return step_folders(run).get(step, run / "checkpoints" / f"step-{step:08d}")


def require_shared(run: Path) -> None:
    """Raise UsageError where a run that another process has begun is not seen."""
    if not is_run(run):
        raise UsageError(f"{run} is not seen by all ranks; name a folder that all machines share")


def newest_settings(run: Path) -> dict[str, Any]:
    """What a resumed run may change, as the newest checkpoint has it whose state can be read."""
    for _ in range(TRIES):
        there = listing(require_run(run))
        for _, folder in sorted(step_folders(run).items(), reverse=True):
            try:
                return places.found(run, read_state(folder).get("settings", {}))
            except CorruptError:
                if listing(run) != there:  # it was replaced while it was read
                    break
        else:
            break
    return {}  # whoever opens the checkpoint says so


def listing(run: Path) -> list[tuple[int, list[int] | None]]:
    """Return the steps of a run's checkpoints, and what tells each from one that replaces it.

    A training deletes checkpoints at any time. What could not be read is damaged only if the
    listing is still the same.
    """
    return [(step, stamp_of(folder)) for step, folder in sorted(step_folders(run).items())]


def require_run(run: Path) -> Path:
    """`run`, if it is a run folder; UsageError if not."""
    if claims(run, RUN):
        return run
    raise UsageError(not_a_run.about(run))


def read_config(run: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration and the training settings that config.json states."""
    body = read_json(require_run(run) / "config.json")
    for part, what in (("model", "no model"), ("train", "no settings of training")):
        if not isinstance(body.get(part), dict):
            raise CorruptError(f"{run}/config.json: states {what}")
    unknown = body["model"].keys() - {f.name for f in fields(ModelConfig)}
    if unknown:
        raise CorruptError(f"{run}/config.json: unknown model setting {sorted(unknown)[0]!r}")
    if body["model"].get("vocab_size") is None:
        raise CorruptError(f"{run}/config.json: the model has no vocab_size")
    try:
        model = ModelConfig(**body["model"])
    except UsageError as error:
        raise CorruptError(f"{run}/config.json: {error}") from None
    if model.bos_id is not None and model.bos_id not in range(model.vocab_size):
        raise CorruptError(f"{run}/config.json: bos_id is {model.bos_id!r}")
    return model, places.found(run, body["train"])


def read_facts(run: Path) -> dict[str, Any]:
    """All that config.json says; CorruptError unless it says what a run goes on with."""
    facts = read_json(require_run(run) / "config.json")
    for name in ("corpus", "corpus_key", "tokenizer_sha256"):
        if not isinstance(facts.get(name), str):
            raise CorruptError(f"{run}/config.json: {name} is {facts.get(name)!r}, not a text")
    if type(facts.get("asked_vocab_size")) not in (int, type(None)):
        raise CorruptError(f"{run}/config.json: asked_vocab_size is no number")
    if facts.get("data_order", 1) not in (1, 2):
        raise CorruptError(f"{run}/config.json: data_order is {facts['data_order']!r}, not 1 or 2")
    return facts


def data_order(run: Path) -> int:
    """Return the number of the order in which a run reads its data; older runs state none."""
    return read_facts(run).get("data_order", 1)


def fixed_of(run: Path) -> dict[str, Any]:
    """What a run that has no checkpoint yet decided at its start: threads, dtype, micro-batch."""
    facts = read_json(run / "config.json")
    return {name: facts[name] for name in ("threads", "dtype", "micro_batch_size", "ranks")}


def write_config(run: Path, model: ModelConfig, train: dict, facts: dict) -> None:
    """Write config.json: the resolved configuration and the facts of where the run was made.

    Paths in it are seen from the run's folder; see places.py.
    """
    if "corpus" in facts:
        facts = {**facts, "corpus": places.path_stated(run, facts["corpus"])}
    train = places.stated(run, train)
    write_json(run / "config.json", {"model": asdict(model), "train": train, **facts})


def corpus_places(run: Path, cache: str | None = None) -> list[Path]:
    """Return where the prepared text of a run may be, the likeliest place first.

    That is the place that config.json states, and the run's key below `cache` and below every
    data/prepared of the current folder and of those that the run lies in.
    """
    facts = read_facts(run)
    stated = Path(places.path_found(run, facts["corpus"]))
    usual = (folder / "data" / "prepared" for folder in (Path(), *run.resolve().parents))
    caches = ([Path(cache)] if cache else []) + list(usual)
    return [stated, *(folder / facts["corpus_key"][:16] for folder in caches)]


def corpus_of(run: Path) -> Path:
    """Return the prepared text of a run. UsageError if it is nowhere that it may be."""
    for folder in corpus_places(run):
        if claims(folder, CORPUS):
            return folder
    raise UsageError(f"{run}: its prepared text, {corpus_places(run)[0]}, is not there")


def tokenizer_path(run: Path) -> Path:
    """The tokenizer's file in a run. CorruptError if it is missing or another than stated."""
    files = [p for n in ("tokenizer.model", "tokenizer.json") if (p := run / n).is_file()]
    if not files:
        raise CorruptError(f"{run}: has no tokenizer.model or tokenizer.json")
    if read_json(run / "config.json").get("tokenizer_sha256") != file_digest(files[0]):
        raise CorruptError(f"{files[0]}: is not the tokenizer that the run was trained with")
    return files[0]


def load_run_tokenizer(run: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a run. CorruptError if it does not belong."""
    path = tokenizer_path(run)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise CorruptError(
            f"{path}: {tokenizer.vocab_size} tokens, the model knows {config.vocab_size}"
        )
    return tokenizer
