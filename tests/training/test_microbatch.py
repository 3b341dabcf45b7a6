"""The micro-batch: the largest divisor of the batch that fits, by a memory of our own making."""

import math

import pytest
import torch

from minillm.config.train import ModelConfig
from minillm.distributed.ranks import Ranks
from minillm.distributed.strategies import shard
from minillm.errors import UnavailableError
from minillm.model.gpt import GPT
from minillm.model.size import n_parameters
from minillm.ops import EAGER
from minillm.training import microbatch
from minillm.training.microbatch import largest_that_fits, seconds_per_step

CPU = torch.device("cpu")


@pytest.fixture
def model() -> GPT:
    return GPT(ModelConfig(vocab_size=20, seq_len=16, n_layer=2, n_head=2, d_model=16), EAGER)


@pytest.mark.parametrize("copies", [0, 1, 4])
@pytest.mark.parametrize(
    "sequences, batch_size, expected",
    [(100, 12, 12), (11, 12, 6), (5, 12, 4), (3.5, 12, 3), (1, 12, 1), (6, 7, 1), (7, 7, 7)],
)
def test_the_largest_divisor_that_fits(model, monkeypatch, sequences, batch_size, expected, copies):
    """What does not grow with the sequences is counted once, and room is left for the copies."""
    one, two = (microbatch._bytes_for_backward(model, rows, CPU) for rows in (1, 2))
    assert 0 < two - one < one
    need = one + (sequences - 1) * (two - one) + copies * 4 * n_parameters(model.config)
    free = math.ceil(need / microbatch.SHARE)
    monkeypatch.setattr(microbatch, "available_memory", lambda device: free)
    assert largest_that_fits(model, batch_size, CPU, copies) == expected


def test_where_the_system_says_nothing_four_gib_are_reckoned_with(model, monkeypatch):
    monkeypatch.setattr(microbatch, "available_memory", lambda device: None)
    assert largest_that_fits(model, 12, CPU, 2) == 12
    seen = microbatch.UNKNOWN * microbatch.SHARE / 5.5
    monkeypatch.setattr(microbatch, "_bytes_for_backward", lambda model, rows, *_: rows * seen)
    assert largest_that_fits(model, 12, CPU, 0) == 4


@pytest.mark.parametrize("free, copies", [(1000, 0), (40_000, 1_000), (0, 0)])
def test_no_room_for_one_sequence(model, monkeypatch, free, copies):
    monkeypatch.setattr(microbatch, "available_memory", lambda device: free)
    with pytest.raises(UnavailableError, match="one sequence of 16 tokens does not fit"):
        largest_that_fits(model, 8, CPU, copies)


@pytest.mark.parametrize("recurrent", [None, "1,1,1", "4,2,4", "0,2,0"])
@pytest.mark.parametrize("style", ["huginn", "parcae"])
def test_checkpointing_is_reckoned_with_its_second_pass(recurrent, style):
    """Less than without, more than what is kept all along: a piece is computed again beside it."""
    shape = {"vocab_size": 20, "seq_len": 16, "n_layer": 6, "n_head": 2, "d_model": 16}
    shape |= {"recurrent": recurrent, "mean_recurrence": 4, "recurrence_style": style}
    model = GPT(ModelConfig(**shape), EAGER)
    without = microbatch._bytes_at_most(model, 2, CPU)
    model.checkpointing = True
    at_most = microbatch._bytes_at_most(model, 2, CPU)
    kept = microbatch._bytes_for_backward(model, 2, CPU, microbatch._deepest(model))
    assert kept < at_most < without and model.checkpointing
    if recurrent is not None:
        assert at_most - kept >= bytes_of_an_iteration(model, 2)


def bytes_of_an_iteration(model: GPT, rows: int) -> int:
    """What one iteration of the core keeps while it is computed again."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    inputs, x = model.embed_tokens(torch.zeros(rows, 16, dtype=torch.int64), None)
    text = model.injection.prepare(x)
    found = {}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model._iteration(x, text, inputs, 0)
    return sum(found.values())


def test_what_a_backward_keeps_grows_with_the_model(model):
    kept = microbatch._bytes_for_backward(model, 1, CPU)
    # At the least the inputs of the eight matrices of two blocks: 16 tokens of 16 (or 64) floats.
    assert kept > 2 * 16 * (3 * 16 + 64) * 4
    deeper = GPT(ModelConfig(vocab_size=20, seq_len=16, n_layer=4, n_head=2, d_model=16), EAGER)
    assert 1.5 * kept < microbatch._bytes_for_backward(deeper, 1, CPU) < 2.1 * kept


def test_on_a_gpu_running_out_is_caught(model, monkeypatch):
    """Beside what the optimiser will take: with the copies less fits."""
    tried, held = [], []

    def hold(size, dtype, device):
        held.append(size)

    def run(model, rows, device, recurrence):
        tried.append(rows)
        if held[-1] + rows * 1000 > 5000:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(microbatch, "_run", run)
    monkeypatch.setattr(torch, "empty", hold)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5000, 5000))
    assert largest_that_fits(model, 12, torch.device("cuda"), 0) == 4
    assert tried == [12, 6, 4]
    with pytest.raises(UnavailableError, match="does not fit"):
        largest_that_fits(model, 12, torch.device("cuda"), 3)
    assert held[0] == 0 and held[-1] == 12 * n_parameters(model.config)


def test_a_trial_leaves_no_gradient_and_no_change(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    largest_that_fits(model, 4, CPU, 2)
    assert seconds_per_step(shard(model, [], Ranks()), 4, 2, CPU) > 0
    for name, p in model.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])


def test_what_a_core_keeps_grows_with_the_iterations_that_carry_gradients():
    """Those at most that a draw may ask for; it is reckoned with the deepest."""
    kept = []
    for depth, most in ((2, 16), (8, 16), (8, 4)):
        shape = {"mean_recurrence": 4, "max_recurrence": most, "backprop_depth": depth}
        config = ModelConfig(
            vocab_size=20, seq_len=16, n_head=2, d_model=16, recurrent="1,1,1", **shape
        )
        kept.append(microbatch._bytes_at_most(GPT(config, EAGER), 1, CPU))
    two, eight, four = kept
    assert two < four < eight and (eight - four) == pytest.approx(2 * (four - two), rel=0.05)
