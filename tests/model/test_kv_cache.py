"""Where a row's next entry stands in the cache; test_generate.py shows that the right ones do."""

import pytest
import torch

from minillm.model.kv_cache import KVCache


@pytest.fixture
def cache() -> KVCache:
    return KVCache((2, 0, 0), 1, batch=3, capacity=6, n_kv_head=1, d_head=4)


def test_rows_of_one_length_are_told_as_one_number(cache):
    cache.advance(2)
    assert cache.equal_lengths() and cache.next_positions() == 2
    assert cache.positions(2).tolist() == [[2, 3]] * 3


def test_ragged_rows_are_told_to_the_device_once_a_token(cache):
    cache.lengths = [0, 2, 1]
    starts = cache.next_positions()
    assert starts.tolist() == [0, 2, 1] and cache.next_positions() is starts
    assert cache.positions(2).tolist() == [[0, 1], [2, 3], [1, 2]]
    cache.advance(1)
    assert cache.next_positions().tolist() == [1, 3, 2]
    cache.lengths[0] = 5  # in place, as `generate` does when a row begins anew
    assert cache.next_positions().tolist() == [5, 3, 2]
    cache.keep_rows([2, 0])
    assert cache.next_positions().tolist() == [2, 5]
    assert starts.tolist() == [0, 2, 1]


def test_what_is_written_stands_after_what_was_held(cache):
    for lengths in ([1, 1, 1], [0, 2, 1]):
        cache.lengths, new = lengths, torch.rand(2, 3, 2, 1, 4)
        for held, given in zip(cache.write(1, *new), new, strict=True):
            assert held.shape[1] == max(lengths) + 2
            for b, length in enumerate(lengths):
                assert torch.equal(held[b, length : length + 2], given[b])


def test_too_many_entries_are_refused(cache):
    cache.lengths = [5, 0, 0]
    with pytest.raises(ValueError, match="cache holds 6 positions; 7 are needed"):
        cache.entries(0, 2)
