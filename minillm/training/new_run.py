"""Create the folder of a new run, with its tokenizer and its config.json."""

from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

from minillm.checkpoint import placing
from minillm.checkpoint.run_folder import RunFolder
from minillm.config.flags import Settings
from minillm.data.batches import ORDER
from minillm.data.shards import Corpus
from minillm.distributed.agreement import agree
from minillm.runtime.versions import commit, versions
from minillm.training.setup import Setup


def begin_run(held: ExitStack, setup: Setup, settings: Settings) -> Path:
    """Create the run folder with its tokenizer and config.json, and return it.

    setup: everything that is decided before the first step
    settings: settings of the run
    held: holds the lock of the folder, so that no other process writes it
    """
    config, ranks = setup.config, setup.ranks

    def create() -> str:
        launch, sources = ranks.world.launch, placing.sources(settings)
        run, lock = placing.make_run(config.out, config.preset, config.overwrite, launch, sources)
        held.enter_context(lock or nullcontext())
        setup.corpus.tokenizer().save(run)
        facts = _facts(settings, setup.corpus, launch) | setup.decided
        # This makes the folder a run.
        RunFolder(run).write_config(setup.model.config, asdict(config), facts)
        return str(run)

    made = agree(ranks, lambda: create() if ranks.rank == 0 else None)
    folder = Path(ranks.broadcast(made))
    agree(ranks, RunFolder(folder).require_shared)
    return folder


def _facts(settings: Settings, corpus: Corpus, launch: str | None) -> dict:
    """Return what config.json states besides the settings: versions, commit, corpus, launch.

    launch: torchrun's name of the launch
    """
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
