"""From a command line of train.py to its settings, its run folder and its corpus."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from minillm.checkpoint import placing
from minillm.checkpoint.run_folder import RunFolder, run_of_launch
from minillm.config.config_files import read_config
from minillm.config.fields import as_tuple
from minillm.config.flags import Settings
from minillm.config.resolve import PREPARED, as_train_config, recurrence_settings, resolve
from minillm.config.train import ModelConfig, TrainConfig
from minillm.data.batches import ORDER, Batches
from minillm.data.held_out import require_validation
from minillm.data.prepare import Preparation, prepare, refuse_settings
from minillm.data.shards import Corpus, is_prepared, open_corpus
from minillm.data.tokenizer import KINDS
from minillm.distributed.agreement import gather
from minillm.distributed.ranks import Ranks
from minillm.errors import UnavailableError, UsageError
from minillm.model.size import n_parameters
from minillm.planning import estimate as plan
from minillm.runtime import device as world, relative_paths as places
from minillm.runtime.files import check_place, file_digest
from minillm.runtime.json_text import json_text
from minillm.runtime.launch import World, shell_command
from minillm.runtime.versions import commit, versions
from minillm.training.resuming import resumed

HELD = ("parameters", "gradients", "masters", "moments")  # by a rank, of plan.memory


def begin(
    args: Namespace, here: World, preset: str | None = None
) -> tuple[Settings, RunFolder | None]:
    """The settings and, where a run is resumed, its folder.

    preset: what holds where the user names none; None: the one that fits the device here.
    here: a launch that torchrun has started again goes on with its own run, whatever the flags.
    Raises UsageError if the flags do not fit together or --out is in use.
    """
    if args.resume is not None:
        return resumed(args)
    if preset is None:
        device = args.device
        if device is None and args.config is not None:
            device = read_config(Path(args.config)).get("device")
        preset = "nano" if world.pick_device(device or "auto").type == "cpu" else "tiny"
    settings = resolve(vars(args), args.config, preset)
    train = settings.train
    if here.attempt and (run := run_of_launch(here.launch, train.out)) is not None:
        past = run.train | run.newest_settings()
        # The places of the same command line are known better than from the run's files.
        past |= {name: x for name in places.PATHS[:-1] if (x := getattr(train, name, None))}
        return Settings(run.model, as_train_config(run.path, past), frozenset()), run
    if train.init_from:
        flags = {name for name, value in vars(args).items() if value is not None}
        settings = _inherit(settings, RunFolder(train.init_from), flags)
    if train.out and here.rank == 0:
        out = Path(train.out)
        placing.check_out(out, train.overwrite, here.launch, placing.sources(settings, args.config))
    for name, place in (("out", train.out or "runs"), ("cache_dir", train.cache_dir)):
        check_place(name, Path(place))
    return settings, None


def _inherit(settings: Settings, source: RunFolder, flags: set[str]) -> Settings:
    """The model's shape and the tokenizer of run `source`; the training of `settings`.

    How often a core runs may be set anew: with a new mean, what else is not given follows it.
    flags: settings that the command line names; the others of `settings.given` are from a file.
    Raises UsageError on what `source` fixes, and on settings of a core that it has not.
    """
    model = source.model
    often = {"mean_recurrence", "max_recurrence", "backprop_depth"}
    fixed = (asdict(model).keys() | {"tokenizer"}) - often - {"dropout"}
    tokenizer = str(source.tokenizer_file)
    own = asdict(model) | {"tokenizer": tokenizer}
    asked = source.facts["asked_vocab_size"]
    given = {name: value for name, value in settings.flat().items() if name in settings.given}
    for name in sorted(fixed & given.keys()):
        # A file states all that its run had, and the vocabulary size as it was asked for.
        same = given[name] == own[name] or (name == "vocab_size" and given[name] == asked)
        if name in flags or not same:
            raise UsageError(
                f"--{name.replace('_', '-')} cannot be set with --init-from: {source} fixes it"
            )
    idle = recurrence_settings(given)
    if idle and model.recurrent is None:
        raise UsageError(
            f"--{idle[0].replace('_', '-')} is of recurrent depth; {source} has no core to run "
            "again; leave it out"
        )
    wished = {name: given[name] for name in often & given.keys()}
    derived = ["max_recurrence", "backprop_depth"] if "mean_recurrence" in wished else []
    if "max_recurrence" in wished:
        derived.append("backprop_depth")
    wished = {**dict.fromkeys(derived), **wished, "dropout": settings.model.dropout}
    train = replace(settings.train, tokenizer=tokenizer)
    return Settings(replace(model, **wished), train, settings.given - fixed)


def find_corpus(settings: Settings, run: RunFolder | None, say: Callable[[str], None]) -> Corpus:
    """The prepared text: of a run to resume the very same, else of --data.

    run: the folder to resume, or None.
    """
    train = settings.train
    if run is None:
        corpus = _prepare(settings, say)
        if train.init_from and corpus.tokenizer().sha256 != file_digest(Path(train.tokenizer)):
            raise UsageError(
                f"--data {' '.join(as_tuple(train.data))} was prepared with another tokenizer than "
                f"{train.init_from}'s"
            )
        return require_validation(corpus, train.early_stop)
    there = [p for p in run.corpus_places(train.cache_dir) if is_prepared(p)]
    if there and not {"data", "val"} & settings.given:
        corpus = open_corpus(there[0])
    else:
        try:
            corpus = _prepare_again(settings, run, say)
        except UsageError as error:
            hint = "say where with --data" + " and --val" * (train.val is not None)
            raise UsageError(
                f"{error.text}; if the text has moved, {hint}, or with --cache-dir if it is "
                "prepared"
            ) from None
    if corpus.key != run.facts["corpus_key"]:
        given = {"data", "val"} & settings.given
        where = "" if given else "; if that has moved, say where with --data"
        raise UsageError(
            f"the text is not what {run} was trained on{where}; start a new run with its weights: "
            f"{shell_command('train', '--init-from', run)}"
        )
    return require_validation(corpus, train.early_stop)


def _prepare_again(settings: Settings, run: RunFolder, say: Callable[[str], None]) -> Corpus:
    """As for the run's first step: with the vocabulary size it asked for, and its own tokenizer."""
    facts, train = run.facts, settings.train
    asked, stated = facts["asked_vocab_size"], facts.get("corpus_settings") or {}
    if train.tokenizer not in KINDS:
        train = replace(train, tokenizer=str(run.tokenizer_file))
    model = replace(settings.model, vocab_size=asked)
    return _prepare(replace(settings, model=model, train=train), say, "split" not in stated)


def _prepare(
    settings: Settings, say: Callable[[str], None], whole_documents: bool = False
) -> Corpus:
    train = settings.train
    paths = as_tuple(train.data)
    prepared = len(paths) == 1 and is_prepared(paths[0])
    if prepared:
        refuse_settings(paths[0], settings.given & PREPARED)
    sized = train.tokenizer == "bpe" or "vocab_size" in settings.given
    how = Preparation(
        tokenizer=train.tokenizer,
        vocab_size=settings.model.vocab_size if sized and not train.init_from else None,
        val_fraction=train.val_fraction,
        val=None if prepared else as_tuple(train.val),
        errors=train.errors,
        encoding=train.encoding,
        text_column=train.text_column,
        whole_documents=whole_documents,
    )
    return prepare(paths or None, how, cache_dir=Path(train.cache_dir), say=say)


def batches_of(
    run: RunFolder | None, corpus: Corpus, seq_len: int, config: TrainConfig, ranks: int
) -> Batches:
    """Return the batches of a new run, or of `run` in the data order that it began with."""
    order = ORDER if run is None else run.data_order
    return Batches(corpus, seq_len, config.batch_size, config.seed, ranks, order)


def rows_of_a_rank(config: TrainConfig, size: int) -> int:
    """Sequences of a step on each of `size` ranks, of which all do the same work.

    Raises UsageError if they do not divide.
    """
    if config.batch_size % size:
        raise UsageError(
            f"--batch-size {config.batch_size} is not a multiple of {size} ranks; nearest: "
            f"{max(1, round(config.batch_size / size)) * size}"
        )
    rows = config.batch_size // size
    if rows % config.recurrence_groups:
        raise UsageError(
            f"--recurrence-groups {config.recurrence_groups} does not divide the {rows} sequences "
            f"of each of {size} ranks"
        )
    return rows


def fit_to_corpus(settings: Settings, corpus: Corpus) -> ModelConfig:
    """The model with the tokenizer's vocabulary and, where the corpus has sequences with targets of
    their own and --seq-len was not given, their length.

    Raises UsageError if a document mask is asked for and documents have no mark, or if the
    tokenizer cannot encode --sample-prompt.
    """
    model, bos = settings.model, corpus.tokenizer().bos_id
    if corpus.sequence and "seq_len" not in settings.given:
        model = replace(model, seq_len=corpus.sequence)
    _check_sample_prompt(settings.train.sample_prompt or "", corpus)
    if model.document_mask and bos is None:
        raise UsageError("--document-mask needs documents marked by BOS; --tokenizer char has none")
    return replace(model, vocab_size=corpus.vocab_size, bos_id=bos)


def _check_sample_prompt(prompt: str, corpus: Corpus) -> None:
    """Raise UsageError now if no sample could continue `prompt` later."""
    if prompt and corpus.sequence:
        raise UsageError(
            f"--sample-prompt: no samples are taken of {corpus.folder}, whose answers are not the "
            "next tokens; leave it out"
        )
    try:
        corpus.tokenizer().encode(prompt)
    except UsageError as error:
        raise UsageError(f"--sample-prompt: {error.text}") from None


def require_memory(model: ModelConfig, config: TrainConfig, ranks: Ranks) -> None:
    """Raise UnavailableError if a rank's weights and optimiser alone cannot fit on its device."""
    job = plan.Job(model, ranks.size, config.batch_size, None, optimizer=config.optimizer)
    each = plan.memory(job, config.zero)
    need = max(4 * n_parameters(model), sum(each[kind] for kind in HELD))  # it is built whole
    room = room_of_a_rank(ranks)
    if room is not None and need > room:
        raise UnavailableError(
            f"{n_parameters(model):,} parameters need {need / 2**30:,.1f} GiB to train and "
            f"{room / 2**30:,.1f} GiB are free; reduce --d-model or --n-layer"
        )


def room_of_a_rank(ranks: Ranks) -> int | None:
    """Bytes that this rank may take: of a CPU's its share among the ranks of this machine."""
    room = world.available_memory(ranks.device)
    shared = ranks.device.type == "cpu" and room is not None
    return room // ranks.world.local_size if shared else room


def refuse_differences(
    ranks: Ranks, corpus: Corpus, settings: Settings, run: RunFolder | None
) -> None:
    """Raise UsageError unless all ranks train the same: text, settings, run to resume."""
    own = ("device", "threads", "data", "val")
    config = {n: x for n, x in settings.flat().items() if n not in own}
    told = {"text": corpus.key, "settings": json.dumps(config, sort_keys=True, default=str),
            "run to resume": str(run)}  # fmt: skip
    every = gather(ranks, told)
    for what in told:
        if len({each[what] for each in every}) > 1:
            raise UsageError(f"the ranks do not have the same {what}; see that all machines agree")


def facts_of(settings: Settings, corpus: Corpus, launch: str | None) -> dict:
    """What config.json says beside the settings: versions, commit, corpus, torchrun's name."""
    return {
        "versions": versions(),
        "git_commit": commit(),
        "launch": launch,
        "corpus": str(corpus.folder),
        "corpus_key": corpus.key,
        "corpus_settings": corpus.settings,
        "data_order": ORDER,
        "asked_vocab_size": settings.model.vocab_size,
        "tokenizer_sha256": corpus.tokenizer().sha256,
    }


def config_text(settings: Settings) -> str:
    """The settings as JSON that --config takes."""
    stated = {k: places.as_text(v) for k, v in settings.flat().items() if v is not None}
    return json_text(stated, indent=1)
