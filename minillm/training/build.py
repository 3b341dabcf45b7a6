"""Build a run in memory, new or from a checkpoint: its text, model, state and length."""

from math import gcd

from minillm.checkpoint.find import open_checkpoint
from minillm.checkpoint.read import Checkpoint
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.write import set_aside
from minillm.config.flags import Settings
from minillm.config.model import ModelConfig
from minillm.config.resolve import LENGTHS, settings_at_checkpoint
from minillm.data.batches import Batches
from minillm.data.shards import Corpus
from minillm.distributed.agreement import agree, in_turn
from minillm.distributed.ranks import Ranks
from minillm.optim.ema import Average
from minillm.optim.loss_scale import start_scale
from minillm.runtime import device
from minillm.training.budget import StepBudget, requested_steps
from minillm.training.corpus import batches_of, find_corpus, fit_to_corpus, refuse_differences
from minillm.training.microbatch import seconds_per_step
from minillm.training.setup import (
    DTYPES,
    Setup,
    build_model,
    build_sharding,
    find_micro_batch,
    load_initial_weights,
    require_memory,
    rows_of_a_rank,
    set_threads,
)
from minillm.training.snapshot import restore, resume_schedule
from minillm.training.state import TrainState, saved_progress, shared_schedule


def build(
    settings: Settings, run: RunFolder | None, ranks: Ranks
) -> tuple[Setup, TrainState, StepBudget]:
    """Return what a run trains with, its state and its length. Every rank calls it.

    settings: settings as the command line has them
    ranks: ranks that train together
    run: folder of the run to resume, at its last checkpoint if it has one; None for a new run

    Raises UsageError, UnavailableError or CorruptError where the run cannot begin.
    """
    past = _last_checkpoint(run, ranks)
    progress = saved_progress(past)
    if past:
        settings = settings_at_checkpoint(settings, past.state, past.folder, ranks.world.launch)
    corpus, shape, batches = _build_data(settings, run, ranks)
    setup = _build_setup(settings, run, past, corpus, shape, batches, ranks)
    step_s = seconds_per_step(setup.sharding, setup.rows, setup.micro_batch, ranks.device)
    config, step_s = setup.config, ranks.broadcast(step_s)
    requested = requested_steps(config, batches)
    budget = StepBudget(config, requested, progress.trained_s, step_s)
    state = TrainState(
        progress=progress, schedule=budget.schedule(), loss_scale=start_scale(setup.model.dtype)
    )
    if past:
        restore(setup, state, past)
        resume_schedule(state, budget, past, settings.given)
    elif config.ema:
        state.average = Average(dict(setup.model.named_parameters()), config.ema)
    state.schedule = shared_schedule(state.schedule, ranks)
    return setup, state, budget


def _last_checkpoint(run: RunFolder | None, ranks: Ranks) -> Checkpoint | None:
    """Return the newest good checkpoint of a run to resume; None if it has none yet.

    Newer ones, which are damaged, are renamed, so that they do not count as checkpoints any more.
    """
    begun = run is not None and ranks.broadcast(bool(run.step_folders()))
    past = open_checkpoint(run, ranks=ranks) if begun else None
    if past:
        agree(ranks, lambda: ranks.rank or set_aside(run, past.step))
    return past


def _build_data(
    settings: Settings, run: RunFolder | None, ranks: Ranks
) -> tuple[Corpus, ModelConfig, Batches]:
    """Return the prepared text, the model's configuration that fits it, and the batches."""
    config = settings.train
    corpus = in_turn(ranks, "corpus", lambda: find_corpus(settings, run, ranks.say))
    refuse_differences(ranks, corpus, settings, run)
    shape = fit_to_corpus(settings, corpus)
    rows_of_a_rank(config, ranks.size)  # refused before anything is built
    agree(ranks, lambda: require_memory(shape, config, ranks))
    return corpus, shape, batches_of(run, corpus, shape.seq_len, config, ranks.size)


def _build_setup(
    settings: Settings,
    run: RunFolder | None,
    past: Checkpoint | None,
    corpus: Corpus,
    shape: ModelConfig,
    batches: Batches,
    ranks: Ranks,
) -> Setup:
    """Return the model on its ranks with its optimizers, and everything else that stays fixed.

    run, past: run to resume, and its checkpoint, whose decisions are kept
    """
    config = settings.train
    decided = dict(past.state["fixed"] if past else run.fixed if run else {})
    given = "threads" in settings.given
    decided["threads"], reason = set_threads(config, decided, ranks, given=given)
    dtype = device.pick_dtype(decided.get("dtype", config.dtype), ranks.device, shape.d_model)
    decided["dtype"] = DTYPES[dtype]
    model = build_model(shape, config, dtype, ranks)
    rows = rows_of_a_rank(config, ranks.size)
    if "micro_batch_size" not in decided:
        decided["micro_batch_size"] = find_micro_batch(model, config, rows, ranks)
    decided["ranks"] = ranks.size
    if config.init_from and not past:
        load_initial_weights(model, config.init_from, ranks)
    return Setup(
        config=config,
        corpus=corpus,
        batches=batches,
        sharding=build_sharding(model, config, dtype, ranks),
        decided=decided,
        micro_batch=gcd(rows, decided["micro_batch_size"]),
        threads_reason=reason,
        asked_lengths=settings.given & LENGTHS if run else frozenset(),
    )
