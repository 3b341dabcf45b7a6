"""Ranks that tell one another what they have, and that fail together."""

import pytest

from minillm.distributed.agreement import agree, gather
from minillm.distributed.ranks import Ranks
from minillm.errors import (
    CorruptError,
    DivergedError,
    UnavailableError,
    UsageError,
    parameter,
)
from tests.support.thread_ranks import together, well


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_rank_learns_what_each_has(size):
    values = [{"text": "\u20ac" * n, "list": [n, None, 0.5]} for n in range(size)]
    told = well(together(size, lambda ranks: gather(ranks, values[ranks.rank])))
    assert told == [values] * size


def test_work_that_fails_nowhere():
    assert well(together(3, lambda ranks: agree(ranks, lambda: ranks.rank * 2))) == [0, 2, 4]
    assert agree(Ranks(), lambda: {1}) == {1}  # nothing is sent: it need not be JSON


def failing(errors: dict[int, Exception]):
    def work(ranks):
        if ranks.rank in errors:
            raise errors[ranks.rank]
        return "done"

    return [(type(x), str(x)) for x in together(4, lambda r: agree(r, lambda: work(r)))]


def test_a_refusal_of_one_rank_is_that_of_all():
    assert failing({2: CorruptError("x")}) == [(CorruptError, "x")] * 4
    assert failing({3: CorruptError("x"), 1: DivergedError("y")}) == [(DivergedError, "y")] * 4


def test_an_error_is_raised_as_it_is_and_told_to_the_others():
    told = (UnavailableError, "rank 2 failed: OSError: [Errno 28] full")
    own = (OSError, "[Errno 28] full")
    assert failing({2: OSError(28, "full")}) == [told, told, own, told]
    told = (CorruptError, "x")  # what a refusal says is worth more than that something failed
    assert failing({2: OSError(28, "full"), 3: CorruptError("x")}) == [told, told, own, told]
    own, told = (KeyError, "'k'"), (UnavailableError, "rank 0 failed: KeyError: 'k'")
    assert failing({0: KeyError("k")}) == [own, told, told, told]


def test_alone_an_error_is_what_it_was():
    error = OSError(28, "full")

    def fail():
        raise error

    with pytest.raises(OSError) as raised:
        agree(Ranks(), fail)
    assert raised.value is error


def test_a_refusal_names_its_parameter_on_every_rank():
    """In Python as a parameter, on the command line as a flag."""

    def work(ranks):
        if ranks.rank == 1:
            raise UsageError(f"{parameter('top_k')} -1: expected 0 or more")

    for error in together(3, lambda ranks: agree(ranks, lambda: work(ranks))):
        assert str(error) == "top_k -1: expected 0 or more"
        assert error.with_flags() == "--top-k -1: expected 0 or more"
