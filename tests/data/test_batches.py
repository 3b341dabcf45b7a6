"""batches.py: batches as pure functions, checked reads, evaluation over every token once."""

import os
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from minillm.data import batches as data, shards
from minillm.data.batches import ROUNDS, Batches, Tokens, evaluation_windows, permute, warnings_for
from minillm.data.tokenizer import train_tokenizer
from minillm.errors import CorruptError, UsageError
from tests.support.broad import broad


def write_corpus(folder, train, val=(), shard_tokens=10**6, vocab_size=None):
    """A prepared corpus of the given ids; the byte tokenizer stands in for a larger one."""
    folder.mkdir()
    tokenizer = train_tokenizer("byte", [])
    tokenizer.save(folder)
    entries = []
    for side, ids in (("train", train), ("val", val)):
        writer = shards.ShardWriter(folder, side, vocab_size or 257, shard_tokens)
        writer.add(np.array(ids, np.uint32))
        entries += writer.close()
    content = {
        "source": "numbers",
        "key": "0",
        "tokenizer": "tokenizer.json",
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": 257,
        "dtype": "uint16",
        "bytes_per_split": {"train": len(train), "val": len(val)},
        "documents": {"train": 1, "val": 1},
        "shards": entries,
    }
    shards.write_index(folder, content)
    return shards.open_corpus(folder)


def numbers(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "c", numbers(1000), numbers(101, seed=1), shard_tokens=130)


keys_of = st.integers(0, 2**63).map(
    lambda seed: np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)
)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), keys=keys_of)
def test_permutation_is_a_bijection(n, keys):
    assert sorted(permute(np.arange(n), n, keys).tolist()) == list(range(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(10**9, 2**62), keys=keys_of)
def test_permutation_of_many_is_injective_and_in_range(n, keys):
    index = np.unique(np.linspace(0, n - 1, 200).astype(np.int64).clip(0, n - 1))
    found = permute(index, n, keys)
    assert len(set(found.tolist())) == len(index)
    assert 0 <= found.min() <= found.max() < n


def test_permutation_mixes():
    keys = np.random.SeedSequence(0).generate_state(ROUNDS, np.uint64)
    n = 10_000
    found = permute(np.arange(n), n, keys)
    assert abs(np.corrcoef(np.arange(n), found)[0, 1]) < 0.05
    assert np.abs(np.diff(found)).mean() == pytest.approx(n / 3, rel=0.05)


def test_permutation_needs_no_memory_for_n():
    keys = np.random.SeedSequence(0).generate_state(ROUNDS, np.uint64)
    tracemalloc.start()
    permute(np.arange(16), 10**15, keys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def window_numbers(batches, epoch):
    """Start of each sequence of an epoch, found through the private map from number to start."""
    n = batches.n_windows
    return batches._starts(np.arange(epoch * n, (epoch + 1) * n))


def test_every_window_once_an_epoch_and_another_order_the_next(corpus):
    batches = Batches(corpus, seq_len=8, batch_size=4, seed=7)
    assert batches.n_windows == (1000 - 8) // 8
    offsets = set()
    orders = []
    for epoch in range(20):
        starts = window_numbers(batches, epoch)
        offset = starts.min()
        assert 0 <= offset < 8
        assert sorted(starts) == list(range(offset, offset + 8 * batches.n_windows, 8))
        assert starts.max() + 9 <= 1000
        offsets.add(int(offset))
        orders.append(((starts - offset) // 8).tolist())
    assert len(offsets) > 4
    assert len({tuple(order) for order in orders}) == 20


def test_batch_is_the_windows_of_its_step(corpus):
    batches = Batches(corpus, seq_len=8, batch_size=4, seed=7)
    stream = Tokens(corpus, "train").read(0, 1000)
    starts = np.concatenate([window_numbers(batches, epoch) for epoch in range(3)])
    # Step 30 straddles two epochs: 124 windows are 31 batches, so 31 * 4 begins epoch 1.
    for step in (0, 1, 30, 31, 50):
        tokens, targets = batches.batch(step)
        assert tokens.dtype == targets.dtype == torch.int64
        for row, start in enumerate(starts[4 * step : 4 * step + 4]):
            assert tokens[row].tolist() == stream[start : start + 8].tolist()
            assert targets[row].tolist() == stream[start + 1 : start + 9].tolist()


def test_a_batch_may_straddle_epochs(corpus):
    batches = Batches(corpus, seq_len=64, batch_size=100, seed=7)
    assert batches.n_windows == 14
    tokens, _ = batches.batch(3)
    assert tokens.shape == (100, 64)
    starts = np.concatenate([window_numbers(batches, epoch) for epoch in range(30)])[300:400]
    stream = Tokens(corpus, "train").read(0, 1000)
    assert [row.tolist() for row in tokens] == [stream[s : s + 64].tolist() for s in starts]
    assert batches.epochs(7) == 50


def test_batches_are_pure_and_depend_on_the_seed(corpus):
    first = Batches(corpus, 8, 4, seed=7)
    later = first.batch(40)[0]
    assert torch.equal(Batches(corpus, 8, 4, seed=7).batch(40)[0], later)
    first.batch(3)
    assert torch.equal(first.batch(40)[0], later)
    assert not torch.equal(Batches(corpus, 8, 4, seed=8).batch(40)[0], later)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_together_make_the_one_rank_batch(corpus, world_size):
    alone = Batches(corpus, 16, 12, seed=1)
    shared = Batches(corpus, 16, 12, seed=1, world_size=world_size)
    for step in (0, 4, 5, 17):
        ranks = [shared.batch(step, rank) for rank in range(world_size)]
        for side in (0, 1):
            together = torch.cat([rank[side] for rank in ranks])
            assert torch.equal(together, alone.batch(step)[side])


def test_smallest_corpora(tmp_path):
    for n in (9, 15, 16, 17, 24, 25):
        batches = Batches(write_corpus(tmp_path / str(n), numbers(n)), 8, 3, seed=0)
        for step in range(12):
            assert batches.batch(step)[0].shape == (3, 8)
    assert batches.n_windows == 2
    with pytest.raises(UsageError, match="has 8 tokens, one sequence takes 9; .*seq_len 1"):
        Batches(write_corpus(tmp_path / "few", numbers(8)), 8, 3, seed=0)


@broad("n", [9, 10, 15, 16, 17, 23, 24, 25, 31, 40, 1000], quick=(0, 3, 10))
def test_every_token_is_a_target_in_some_epoch(tmp_path, n):
    """A target is a token behind the first of a window; the first of all tokens has none before."""
    seq_len = 8
    batches = Batches(write_corpus(tmp_path / "c", numbers(n)), seq_len, 1, seed=3)
    starts = {int(s) for epoch in range(300) for s in window_numbers(batches, epoch)}
    targets = {start + 1 + i for start in starts for i in range(seq_len)}
    assert targets == set(range(1, n))


def test_a_run_that_began_with_the_old_order_keeps_it(tmp_path):
    """The old offsets, written out: below seq_len, and none where the last tokens would fit."""
    corpus = write_corpus(tmp_path / "c", numbers(2303))
    old = Batches(corpus, 256, 4, seed=7, order=1)
    new = Batches(corpus, 256, 4, seed=7)
    assert old.n_windows == new.n_windows == 7
    for epoch in range(20):
        key = np.random.SeedSequence([7, epoch]).generate_state(8, np.uint64)[-1]
        assert window_numbers(old, epoch).min() == int(key) % 256
        assert window_numbers(new, epoch).min() == int(key) % (2303 - 7 * 256)


def test_refusals(corpus):
    with pytest.raises(UsageError, match="batch_size 4 is not a multiple of 3 ranks"):
        Batches(corpus, 8, 4, seed=0, world_size=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Batches(corpus, 8, 4, seed=0, world_size=2).batch(0, 2)


@pytest.mark.parametrize("seq_len", [1, 7, 10, 99, 100, 101, 500])
def test_evaluation_covers_each_token_once(corpus, seq_len):
    stream = Tokens(corpus, "val").read(0, 101).tolist()
    windows = evaluation_windows(corpus, "val", seq_len)
    pairs = []
    for tokens, targets in windows:
        assert tokens.shape == targets.shape == (seq_len,)
        real = targets != data.IGNORED
        pairs += zip(tokens[real].tolist(), targets[real].tolist(), strict=True)
    assert pairs == list(zip(stream[:-1], stream[1:], strict=True))
    assert len(windows) == -(-100 // seq_len)


def test_limited_evaluation_is_evenly_spread(corpus):
    whole = evaluation_windows(corpus, "train", 9)
    some = evaluation_windows(corpus, "train", 9, limit=10)
    assert len(whole) == 111 and len(some) == 10
    for i in range(10):
        assert torch.equal(some[i][0], whole[i * 111 // 10][0])
    assert len(evaluation_windows(corpus, "train", 9, limit=1000)) == 111


def test_evaluation_without_a_split_says_what_to_do(tmp_path):
    corpus = write_corpus(tmp_path / "c", numbers(50))
    with pytest.raises(UsageError, match="val split has 0 tokens.*val_fraction"):
        evaluation_windows(corpus, "val", 8)


def test_reads_across_shards(corpus):
    ids = numbers(1000)
    tokens = Tokens(corpus, "train")
    for start, count in ((0, 1000), (129, 2), (130, 130), (100, 500), (999, 1), (1000, 0)):
        assert tokens.read(start, count).tolist() == ids[start : start + count].tolist()
    with pytest.raises(ValueError, match="tokens 999 to 1001 of 1000"):
        tokens.read(999, 2)


def test_a_flipped_bit_is_noticed_when_its_block_is_read(tmp_path):
    n = 3 * shards.BLOCK // 2
    corpus = write_corpus(tmp_path / "c", numbers(n), shard_tokens=10**7)
    path = corpus.shards["train"][0].path
    raw = bytearray(path.read_bytes())
    raw[2 * shards.BLOCK + 5] ^= 1
    path.write_bytes(raw)
    tokens = Tokens(shards.open_corpus(corpus.folder), "train")
    assert tokens.read(0, shards.BLOCK).tolist() == numbers(n)[: shards.BLOCK].tolist()
    with pytest.raises(CorruptError, match="train-00000.bin: block 2 "):
        tokens.read(n - 1, 1)


@pytest.mark.parametrize("touched", [False, True])
def test_a_file_truncated_while_it_is_read_is_an_error(corpus, touched):
    tokens = Tokens(corpus, "train")
    if touched:
        tokens.read(0, 130)
    os.truncate(corpus.shards["train"][0].path, 100)
    with pytest.raises(CorruptError, match="train-00000.bin: (block 0|ends before)"):
        tokens.read(100, 20)


def test_a_shard_that_disappears_is_an_error(corpus):
    corpus.shards["train"][1].path.unlink()
    with pytest.raises(CorruptError, match="train-00001.bin: is missing"):
        Tokens(corpus, "train").read(0, 300)


def test_warnings_about_too_little_data():
    assert warnings_for(1000, 4000, 1000) == []
    (passes,) = warnings_for(1000, 4100, 1000)
    assert "4.1 times" in passes
    (few,) = warnings_for(1000, 1000, 1001)
    assert "fewer than the 1001 parameters" in few
    assert len(warnings_for(10, 100, 100)) == 2
