"""Compute the errors of results against the truth, which is the reference in fp64."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from minillm.ops import REFERENCE
from minillm.profiling.catalogue.entry import BACKWARD, BOTH, FORWARD, Data
from minillm.profiling.catalogue.problem import Problem

Results = dict[str, list[Tensor]]  # by direction; BOTH has the results of both
ROWS = 2048  # rows of logits in memory at a time


def results(function: Callable, data: Data, convert: Callable = lambda x: x) -> Results:
    """Return the results of an operation, and the gradients of its leaves for the data's dy.

    For an operation that works in place, the results are its tensors afterwards. `data` does not
    change.

    function: implementation of the operation
    data: its arguments
    convert: function that is applied to each floating tensor first
    """
    leaves = {n: convert(x).detach().clone().requires_grad_() for n, x in data.leaves.items()}
    others = {n: _copied(x, convert) for n, x in data.others.items()}
    y = function(**leaves, **others)
    if y is None:
        y = [*others["params"], *others["exp_avgs"], *others["exp_avg_sqs"]]
    y = [y] if isinstance(y, Tensor) else list(y)
    grads: list[Tensor] = []
    if leaves:
        dy = [convert(x) for x in data.dy]
        grads = list(torch.autograd.grad(y, list(leaves.values()), dy))
    y = [t.detach() for t in y]
    return {FORWARD: y, BACKWARD: grads, BOTH: y + grads}


def truth(problem: Problem, data: Data, function: Callable | None = None) -> Results:
    """Return the reference's results in fp64, for the part of the data that is compared.

    problem: operation, sizes and dtype
    data: arguments of the operation
    function: function to call instead of the reference, for example with more arguments
    """
    if problem.op == "linear_cross_entropy":
        function = _in_chunks
    function = getattr(REFERENCE, problem.op) if function is None else function
    leaves = {n: data.part(x) for n, x in data.leaves.items()}
    others = {n: data.part(x) if isinstance(x, Tensor) else x for n, x in data.others.items()}
    part = replace(data, leaves=leaves, others=others, dy=[data.part(x) for x in data.dy])
    return results(function, part, _wide)


def errors(function: Callable, data: Data, true: Results) -> dict[str, float]:
    """Return for each direction the largest error of a result: rms(y - truth) / rms(truth).

    For integers the error is the share that differs. It is nan where there is no result.

    function: implementation of the operation
    data: its arguments
    true: the truth by direction, see `truth`
    """
    found = results(function, data)
    return {
        direction: max((_error(data.part(y), t) for y, t in zip(ys, true[direction], strict=True)),
                       key=lambda e: math.inf if math.isnan(e) else e, default=math.nan)
        for direction, ys in found.items()
    }  # fmt: skip


def _error(y: Tensor, true: Tensor) -> float:
    if not true.is_floating_point():
        return (y != true).double().mean().item()
    return ((y.double() - true).square().mean() / true.square().mean()).sqrt().item()


def _in_chunks(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Return REFERENCE.linear_cross_entropy by rows; all fp64 logits would fill the memory."""
    total = x.new_zeros(())
    for rows in torch.arange(len(x), device=x.device).split(ROWS):
        total = total + len(rows) / len(x) * torch.utils.checkpoint.checkpoint(
            REFERENCE.linear_cross_entropy, x[rows], w, targets[rows], use_reentrant=False
        )
    return total


def _wide(x: Tensor) -> Tensor:
    return x.double()


def _copied(x: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, list):
        return [_copied(y, convert) for y in x]
    if not isinstance(x, Tensor):
        return x
    return convert(x).clone() if x.is_floating_point() else x
