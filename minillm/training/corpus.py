"""Find or prepare the text of a run, and check that the settings fit it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minillm.checkpoint.run_folder import RunFolder
from minillm.config.fields import as_tuple
from minillm.config.flags import Settings
from minillm.config.resolve import PREPARED
from minillm.config.train import ModelConfig, TrainConfig
from minillm.data.batches import ORDER, Batches
from minillm.data.held_out import require_validation
from minillm.data.prepare import Preparation, prepare, refuse_settings
from minillm.data.shards import Corpus, is_prepared, open_corpus
from minillm.data.tokenizer import KINDS
from minillm.distributed.agreement import gather
from minillm.distributed.ranks import Ranks
from minillm.errors import UsageError, parameter
from minillm.runtime.files import file_digest
from minillm.runtime.launch import shell_command


def find_corpus(settings: Settings, run: RunFolder | None, say: Callable[[str], None]) -> Corpus:
    """Return the prepared text: for a resumed run the same text as before, else that of --data.

    settings: settings of the run
    run: folder of the run to resume; None for a new run
    say: prints a line about what is prepared

    Raises UsageError if the text is not there, or not the one that the run was trained on.
    """
    train = settings.train
    if run is None:
        corpus = _prepare(settings, say)
        if train.init_from and corpus.tokenizer().sha256 != file_digest(Path(train.tokenizer)):
            raise UsageError(
                f"{parameter('data')} {' '.join(as_tuple(train.data))} was prepared with another "
                f"tokenizer than {train.init_from}'s"
            )
        return require_validation(corpus, train.early_stop)
    corpus = _corpus_of(run, settings, say)
    if corpus.key != run.facts["corpus_key"]:
        given = {"data", "val"} & settings.given
        where = "" if given else f"; if that has moved, say where with {parameter('data')}"
        raise UsageError(
            f"the text is not what {run} was trained on{where}; start a new run with its weights: "
            f"{shell_command('train', '--init-from', run)}"
        )
    return require_validation(corpus, train.early_stop)


def _corpus_of(run: RunFolder, settings: Settings, say: Callable[[str], None]) -> Corpus:
    """Return the prepared text of a run to resume, prepared again if it is not there."""
    train = settings.train
    there = [p for p in run.corpus_places(train.cache_dir) if is_prepared(p)]
    if there and not {"data", "val"} & settings.given:
        return open_corpus(there[0])
    try:
        return _prepare_again(settings, run, say)
    except UsageError as error:
        names = parameter("data") + (f" and {parameter('val')}" if train.val is not None else "")
        raise UsageError(
            f"{error.text}; if the text has moved, say where with {names}, or with "
            f"{parameter('cache_dir')} if it is prepared"
        ) from None


def _prepare_again(settings: Settings, run: RunFolder, say: Callable[[str], None]) -> Corpus:
    """Prepare the text again with the vocabulary size and the tokenizer of the run."""
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
    """Return the batches of a new run, or those of `run` in the data order that it started with.

    run: folder of the run to resume; None for a new run
    corpus: prepared text
    seq_len: tokens of a sequence
    config: settings of the training
    ranks: number of ranks
    """
    order = ORDER if run is None else run.data_order
    return Batches(corpus, seq_len, config.batch_size, config.seed, ranks, order)


def fit_to_corpus(settings: Settings, corpus: Corpus) -> ModelConfig:
    """Return the model's configuration with the vocabulary of the corpus.

    If the corpus consists of sequences with their own targets, and seq_len was not given, the model
    gets their length.

    settings: settings of the run
    corpus: prepared text

    Raises UsageError if a document mask is asked for and documents have no mark, or if the
    tokenizer cannot encode the sample prompt.
    """
    model, bos = settings.model, corpus.tokenizer().bos_id
    if corpus.sequence and "seq_len" not in settings.given:
        model = replace(model, seq_len=corpus.sequence)
    _check_sample_prompt(settings.train.sample_prompt or "", corpus)
    if model.document_mask and bos is None:
        raise UsageError(
            f"{parameter('document_mask')} needs documents marked by BOS; {parameter('tokenizer')} "
            "char has none"
        )
    return replace(model, vocab_size=corpus.vocab_size, bos_id=bos)


def _check_sample_prompt(prompt: str, corpus: Corpus) -> None:
    """Raise UsageError if no sample could continue `prompt`."""
    if prompt and corpus.sequence:
        raise UsageError(
            f"{parameter('sample_prompt')}: no samples are taken of {corpus.folder}, whose answers "
            "are not the next tokens; leave it out"
        )
    try:
        corpus.tokenizer().encode(prompt)
    except UsageError as error:
        raise UsageError(f"{parameter('sample_prompt')}: {error.text}") from None


def refuse_differences(
    ranks: Ranks, corpus: Corpus, settings: Settings, run: RunFolder | None
) -> None:
    """Raise UsageError unless all ranks have the same text, settings and run to resume.

    ranks: ranks that train together
    corpus: prepared text
    settings: settings of the run
    run: folder of the run to resume; None for a new run
    """
    own = ("device", "threads", "data", "val")
    config = {name: value for name, value in settings.flat().items() if name not in own}
    mine = {"text": corpus.key, "settings": json.dumps(config, sort_keys=True, default=str),
            "run to resume": str(run)}  # fmt: skip
    every = gather(ranks, mine)
    for what in mine:
        if len({each[what] for each in every}) > 1:
            raise UsageError(f"the ranks do not have the same {what}; see that all machines agree")
