"""One training step on two threads that meet once, not after every matrix product.

torch's own threads wait for each other inside each operation; on a machine that others use too, a
step then waits for the slowest core a hundred times. Here each worker takes a part of the batch
through forward and backward alone.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[Any, Any], Tensor]


class _Given(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: Any, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None, *(None if g is None else g * grad for g in ctx.grads)


def in_parts(loss: LossFn, split: Callable[[Any, int], list[Any]], workers: int) -> LossFn:
    """``loss`` (a sum over a batch) computed on ``workers`` threads, for ``fastrec.train.fit``.

    Dropout draws from one generator for all threads, so two runs of one seed are alike, not equal.

    Args:
        loss: ``loss(model, part) -> scalar``; the parts' losses add up.
        split: ``split(batch, workers) -> parts``.
        workers: threads; 1 gives ``loss`` back.
    """
    if workers == 1:
        return loss
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def run(model: nn.Module, part: Any, parameters: list[Tensor]) -> Any:
        with torch.enable_grad():
            value = loss(model, part)
            return value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)

    def together(model: nn.Module, batch: Any) -> Tensor:
        parameters = [p for p in model.parameters() if p.requires_grad]
        parts = split(batch, workers)
        jobs = [pool.submit(run, model, part, parameters) for part in parts]
        done = [job.result() for job in jobs]
        value = torch.stack([v for v, _ in done]).sum()
        grads = []
        for given in zip(*(g for _, g in done), strict=True):
            there = [g for g in given if g is not None]
            grads.append(sum(there[1:], start=there[0]) if there else None)
        return _Given.apply(value, grads, *parameters)

    return together
