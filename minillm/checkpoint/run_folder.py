"""A run folder: its name, its config.json, its tokenizer and the list of its checkpoints.

    runs/NAME/config.json, tokenizer.model|json, metrics.jsonl, samples.txt, checkpoints/

The content of checkpoints is read in read.py and written in write.py.
"""

import os
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from minillm.checkpoint import not_a_run
from minillm.checkpoint.deletion import REPLACED, STEP, holds_only_others
from minillm.checkpoint.read import read_state, stamp_of
from minillm.config.train import ModelConfig
from minillm.data.tokenizer import Tokenizer, load_tokenizer
from minillm.errors import CorruptError, UsageError
from minillm.runtime import relative_paths
from minillm.runtime.files import file_digest, read_json, write_json
from minillm.runtime.launch import shell_command
from minillm.runtime.ownership import CORPUS, RUN, claims, is_run

TRIES = 20  # a training may replace checkpoints while they are listed: the list is read again


class RunFolder:
    """A run folder, whose files are read when they are needed.

    config.json is read and checked once, at the first use of `config`. The list of checkpoints is
    read at each call, because a training may add and delete checkpoints meanwhile. A RunFolder can
    be given wherever the path of a run is expected.

    path: the folder, which need not exist yet
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def require(self) -> "RunFolder":
        """Return self. Raise UsageError if this is not a run folder."""
        if claims(self.path, RUN):
            return self
        raise UsageError(not_a_run.explain(self.path))

    def require_shared(self) -> None:
        """Raise UsageError if this process does not see the run that another process has begun."""
        if not is_run(self.path):
            raise UsageError(
                f"{self} is not seen by all ranks; name a folder that all machines share"
            )

    # The content of config.json.

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json. Its digest has been checked, its fields have not.

        Raises UsageError if this is not a run folder, CorruptError if the file is damaged.
        """
        return read_json(self.require().path / "config.json")

    @cached_property
    def model(self) -> ModelConfig:
        """The configuration of the model. Raises CorruptError if it is missing or not valid."""
        stated, file = self._section("model"), self.path / "config.json"
        unknown = stated.keys() - {f.name for f in fields(ModelConfig)}
        if unknown:
            raise CorruptError(f"{file}: unknown model setting {sorted(unknown)[0]!r}")
        if stated.get("vocab_size") is None:
            raise CorruptError(f"{file}: the model has no vocab_size")
        try:
            model = ModelConfig(**stated)
        except UsageError as error:
            raise CorruptError(f"{file}: {error}") from None
        if model.bos_id is not None and model.bos_id not in range(model.vocab_size):
            raise CorruptError(f"{file}: bos_id is {model.bos_id!r}")
        return model

    @cached_property
    def train(self) -> dict[str, Any]:
        """The settings of the training that began the run; its paths can be opened from here."""
        return relative_paths.found(self.path, self._section("train"))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The content of config.json, whose facts that a resumed training needs have been checked.

        Raises CorruptError if one of them is missing or not of its type.
        """
        file = self.path / "config.json"
        for name in ("corpus", "corpus_key", "tokenizer_sha256"):
            if not isinstance(self.config.get(name), str):
                raise CorruptError(f"{file}: {name} is {self.config.get(name)!r}, not a text")
        if type(self.config.get("asked_vocab_size")) not in (int, type(None)):
            raise CorruptError(f"{file}: asked_vocab_size is no number")
        if self.config.get("data_order", 1) not in (1, 2):
            raise CorruptError(f"{file}: data_order is {self.config['data_order']!r}, not 1 or 2")
        return self.config

    @property
    def data_order(self) -> int:
        """The number of the order in which the run reads its data; older runs state none."""
        return self.facts.get("data_order", 1)

    @property
    def fixed(self) -> dict[str, Any]:
        """Threads, dtype, micro-batch and number of ranks, as decided when the run began."""
        names = ("threads", "dtype", "micro_batch_size", "ranks")
        return {name: self.config[name] for name in names}

    def is_of(self, launch: str | None) -> bool:
        """Return whether the run was begun by torchrun's `launch`."""
        if launch is None or not is_run(self.path):  # a damaged run belongs to no launch
            return False
        return self.config.get("launch") == launch

    def write_config(self, model: ModelConfig, train: dict, facts: dict) -> None:
        """Write config.json: the resolved configuration, and the facts of the run's environment.

        Paths in it are relative to the run's folder, see relative_paths.py.

        model: configuration of the model
        train: settings of the training, by name
        facts: facts of the run by name, such as versions, commit and corpus
        """
        if "corpus" in facts:
            facts = {**facts, "corpus": relative_paths.path_stated(self.path, facts["corpus"])}
        train = relative_paths.stated(self.path, train)
        write_json(self.path / "config.json", {"model": asdict(model), "train": train, **facts})
        for name in ("config", "model", "train", "facts"):
            vars(self).pop(name, None)  # read from an earlier config.json

    def _section(self, name: str) -> dict[str, Any]:
        for each, missing in (("model", "no model"), ("train", "no settings of training")):
            if not isinstance(self.config.get(each), dict):
                raise CorruptError(f"{self}/config.json: states {missing}")
        return self.config[name]

    # The text and the tokenizer.

    def corpus_places(self, cache: str | None = None) -> list[Path]:
        """Return the folders in which the prepared text of the run may be, the likeliest first.

        They are the folder that config.json states, and the run's key below `cache` and below
        data/prepared in the current folder and in each parent of the run folder.
        """
        stated = Path(relative_paths.path_found(self.path, self.facts["corpus"]))
        around = (Path(), *self.path.resolve().parents)
        usual = (folder / "data" / "prepared" for folder in around)
        caches = ([Path(cache)] if cache else []) + list(usual)
        return [stated, *(folder / self.facts["corpus_key"][:16] for folder in caches)]

    def corpus(self) -> Path:
        """Return the prepared text of the run. Raise UsageError if it is in none of them."""
        for folder in self.corpus_places():
            if claims(folder, CORPUS):
                return folder
        raise UsageError(f"{self}: its prepared text, {self.corpus_places()[0]}, is not there")

    @cached_property
    def tokenizer_file(self) -> Path:
        """The file of the tokenizer. Raises CorruptError if it is missing or not the stated one."""
        names = ("tokenizer.model", "tokenizer.json")
        files = [path for name in names if (path := self.path / name).is_file()]
        if not files:
            raise CorruptError(f"{self}: has no tokenizer.model or tokenizer.json")
        if self.config.get("tokenizer_sha256") != file_digest(files[0]):
            raise CorruptError(f"{files[0]}: is not the tokenizer that the run was trained with")
        return files[0]

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raise CorruptError if it does not fit the model."""
        tokenizer = load_tokenizer(self.tokenizer_file)
        if tokenizer.vocab_size > self.model.vocab_size:
            raise CorruptError(
                f"{self.tokenizer_file}: {tokenizer.vocab_size} tokens, the model knows "
                f"{self.model.vocab_size}"
            )
        return tokenizer

    # The present checkpoints.

    def checkpoints(self) -> dict[int, Path]:
        """Return the folders of the complete checkpoints, by step."""
        found = self.step_folders().items()
        return {step: folder for step, folder in found if (folder / "manifest.json").exists()}

    def step_folders(self) -> dict[int, Path]:
        """Return the folders of all checkpoints by step, damaged ones too.

        A checkpoint that was renamed to be replaced counts until the new one has the name. A folder
        in which no file belongs to a checkpoint does not count.
        """
        for _ in range(TRIES):
            folders = self.path.glob("checkpoints/*")
            folders = [f for f in folders if f.is_dir() and not holds_only_others(f)]
            found = {
                int(m[1]): f
                for names in (REPLACED, STEP)
                for f in folders
                if (m := names.fullmatch(f.name))
            }
            # A training that deletes the last one while it saves the next may hide both.
            if found or not any(self.path.glob("checkpoints/*step-*")):
                break
        return found

    def step_folder(self, step: int) -> Path:
        """Return the folder of the checkpoint of one step, which need not exist yet."""
        return self.step_folders().get(step, self.path / "checkpoints" / f"step-{step:08d}")

    def listing(self) -> list[tuple[int, list[int] | None]]:
        """Return (step, stamp) of all checkpoints; a stamp changes when a checkpoint is replaced.

        A checkpoint that could not be read is damaged only if the listing is still the same.
        """
        found = sorted(self.step_folders().items())
        return [(step, stamp_of(folder)) for step, folder in found]

    def newest_settings(self) -> dict[str, Any]:
        """Return the settings that a resumed training may change, from the newest readable state.

        They are empty if there is no checkpoint whose state can be read.
        """
        for _ in range(TRIES):
            before = self.require().listing()
            for _, folder in sorted(self.step_folders().items(), reverse=True):
                try:
                    settings = read_state(folder).get("settings", {})
                    return relative_paths.found(self.path, settings)
                except CorruptError:
                    if self.listing() != before:  # it was replaced while it was read
                        break
            else:
                break
        return {}  # opening the checkpoint reports the damage

    def last_change(self, begun: bool) -> int | None:
        """Return the time at which the newest checkpoint was made, in ns; None if there is none.

        begun: a run without a checkpoint counts from the time at which it began
        """
        for _ in range(TRIES):
            made = [*self.checkpoints().values()]
            made += self.path.glob("config.json") if begun else ()
            with suppress(FileNotFoundError):  # a training has deleted it since it was listed
                if made or not self.step_folders():
                    return max((path.stat().st_mtime_ns for path in made), default=None)
        return None


def newest_run(root: Path = Path("runs"), begun: bool = False) -> RunFolder:
    """Return the run in `root` whose newest checkpoint is the newest.

    root: folder of run folders
    begun: include runs that have no checkpoint yet, from the time at which they began

    Raises UsageError if there is none.
    """
    runs = [RunFolder(path) for path in root.glob("*") if claims(path, RUN)]
    found = [(when, run.path) for run in runs if (when := run.last_change(begun)) is not None]
    if not found:
        raise UsageError(
            f"no run with a checkpoint in {root}/; train one with: {shell_command('train')}"
        )
    return RunFolder(max(found)[1])


def run_of_launch(launch: str | None, out: str | None) -> RunFolder | None:
    """Return the run with a checkpoint that torchrun's `launch` began, if there is one.

    launch: name of the launch; None: without torchrun
    out: the only folder to look at; None: the folders in runs/
    """
    places = [Path(out)] if out else sorted(Path("runs").glob("*"))
    runs = map(RunFolder, places)
    return next((run for run in runs if run.checkpoints() and run.is_of(launch)), None)
