"""Rings by hand, what a fit finds again, and files of links that are none."""

import json

import pytest
from hypothesis import given, strategies as st

from minillm.errors import UsageError
from minillm.planning import network as links
from minillm.planning.network import Link

FAST, SLOW = Link(1e-6, 1e9), Link(1e-5, 1e8)


def test_once_round_a_ring():
    # Of 4 ranks: 3 messages of a quarter each.
    assert SLOW.ring_s(8e8, 4) == pytest.approx(3 * (1e-5 + 2.0))
    assert SLOW.ring_s(0, 4) == pytest.approx(3e-5)
    assert SLOW.ring_s(8e8, 1) == 0


def test_an_all_reduce_goes_round_twice():
    network = links.nodes(4, 8, FAST, SLOW, "by hand")
    once = 3 * (1e-6 + 0.25)
    assert network.seconds("reduce_scatter", 1e9) == pytest.approx(once)
    assert network.seconds("all_gather", 1e9) == pytest.approx(once)
    assert network.seconds("all_reduce", 1e9) == pytest.approx(2 * once)


def test_between_nodes_a_share_travels():
    # 2 nodes of 4: in the node 1 GB, then each rank its quarter, of which half to the other node.
    network = links.nodes(8, 4, FAST, SLOW, "by hand")
    inside, between = 3 * (1e-6 + 0.25), 1e-5 + 0.125e9 / 1e8
    assert network.seconds("reduce_scatter", 1e9) == pytest.approx(inside + between)
    assert not network.measured


@pytest.mark.parametrize("collective", links.ROUNDS)
def test_alone_nothing_is_sent(collective):
    assert links.alone().seconds(collective, 1e9) == 0
    assert links.nodes(1, 8, FAST, SLOW, "").seconds(collective, 1e9) == 0


def test_nodes_are_full():
    with pytest.raises(UsageError, match="gpus 12 does not fill nodes of node_gpus 8"):
        links.nodes(12, 8, FAST, SLOW, "")


@given(
    alpha_s=st.floats(1e-7, 1e-2),
    rate=st.floats(1e6, 1e12),
    ranks=st.integers(2, 64),
    collective=st.sampled_from(sorted(links.ROUNDS)),
)
def test_a_fit_finds_the_link_again(alpha_s, rate, ranks, collective):
    """Where both figures show in the times; a figure that nothing shows cannot be found."""
    true = Link(alpha_s, rate)
    turn = ranks * alpha_s * rate  # bytes at which both take as long
    times = [
        (n, links.ROUNDS[collective] * true.ring_s(n, ranks))
        for n in (turn / 100, turn / 10, turn, turn * 10, turn * 100)
    ]
    found = links.fit(collective, ranks, times)
    assert found.alpha_s == pytest.approx(alpha_s, rel=1e-6)
    assert found.bytes_per_s == pytest.approx(rate, rel=1e-6)
    assert links.error(found, collective, ranks, times) < 1e-6


def test_the_error_is_relative():
    times = [(1000, 2 * FAST.ring_s(1000, 2)), (10**6, FAST.ring_s(10**6, 2))]
    # The link is half of the first time and right about the second.
    assert links.error(FAST, "all_gather", 2, times) == pytest.approx((0.5 + 0.0) / 2)


def test_no_figure_becomes_negative():
    falling = links.fit("all_gather", 2, [(1000, 2.0), (100_000, 1.0)])
    assert falling.alpha_s > 0 and falling.bytes_per_s == float("inf")
    steep = links.fit("all_gather", 2, [(1000, 1e-9), (100_000, 1.0)])
    assert steep.alpha_s == 0 and steep.bytes_per_s > 0


@pytest.mark.parametrize("times", [[(8, 1.0)], [(8, 1.0), (8, 2.0)], [(8, 1.0), (16, 0.0)]])
def test_too_little_to_fit(times):
    with pytest.raises(ValueError, match="expected two sizes or more"):
        links.fit("all_gather", 2, times)


CONTENT = {
    "machine": "two cores",
    "worlds": {
        "2": {
            "date": "today",
            **{name: {"alpha_s": 1e-6, "beta_bytes_per_s": 1e9} for name in links.ROUNDS},
        }
    },
}


def test_a_file_of_links(tmp_path):
    path = tmp_path / "links.json"
    path.write_text(json.dumps(CONTENT))
    network = links.read(path, 2)
    assert network.measured and network.source == "fitted today on two cores"
    assert network.seconds("all_reduce", 1e9) == pytest.approx(2 * FAST.ring_s(1e9, 2))
    with pytest.raises(UsageError, match=r"4 ranks were not measured \(there: 2\)"):
        links.read(path, 4)
    assert links.read(path, 1).seconds("all_reduce", 1e9) == 0


BROKEN = ["", "[]", "{}", '{"worlds": {"2": {}}, "machine": ""}', "\xff", '{"worlds": 3}']
BROKEN += [json.dumps(CONTENT).replace(old, new) for old, new in [
    ("1e-06", "-1"), ("1000000000.0", "0"), ("1e-06", "NaN"), ("1e-06", '"x"'),
]]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_is_none(tmp_path, text):
    path = tmp_path / "links.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"not what benchmarks/zero/fit.py writes"):
        links.read(path, 2)
    with pytest.raises(UsageError, match="no such file"):
        links.read(tmp_path / "none.json", 2)
