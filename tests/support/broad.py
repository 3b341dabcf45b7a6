"""Sweeps of which a few cases are in the quick suite and all others in the slow one."""

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import wraps

import pytest
from hypothesis import HealthCheck, given, settings


def broad(
    names: str | Sequence[str], values: Iterable, quick: int | Collection[int] = 1, ids=None
) -> pytest.MarkDecorator:
    """Like pytest.mark.parametrize, but only a few of the values are quick; the others are slow.

    quick: how many of the first values are quick, or the positions of those that are. Where several
    sweeps cross in one test, a case is quick if it is quick in each of them. Choose cases that are
    cheap and that differ in what the test is about. The names of the cases stay as they are.
    """
    chosen = range(quick) if isinstance(quick, int) else quick
    several = not isinstance(names, str) or "," in names
    cases = []
    for i, value in enumerate(values):
        slow = pytest.param(*(value if several else [value]), marks=pytest.mark.slow)
        cases.append(value if i in chosen else slow)
    return pytest.mark.parametrize(names, cases, ids=ids)


def searched(quick: int, slow: int, **strategies) -> Callable[[Callable], Callable]:
    """Like Hypothesis's given, with so many examples in the quick suite and in the slow one.

    Fixtures may be of one test function: they are shared by all of its examples.
    """
    counts = [quick, pytest.param(slow, marks=pytest.mark.slow)]

    def decorate(body: Callable) -> Callable:
        @wraps(body)
        def test(examples: int, **fixtures) -> None:
            def one(**drawn) -> None:
                body(**fixtures, **drawn)

            shared = [HealthCheck.function_scoped_fixture]
            run = settings(max_examples=examples, suppress_health_check=shared, print_blob=False)
            run(given(**strategies)(one))()

        own = [p for n, p in inspect.signature(body).parameters.items() if n not in strategies]
        examples = inspect.Parameter("examples", inspect.Parameter.KEYWORD_ONLY)
        test.__signature__ = inspect.Signature([*own, examples])
        return pytest.mark.parametrize("examples", counts)(test)

    return decorate
