"""An engine of parts: of a model that is no one plan, native plans for what can be, torch between.

Dynamo traces a copy of the model on the examples, and on them repeated to other batch sizes
(:mod:`fastrec.runtime.native.graphs`). The engine then runs what was made and compiles nothing:
what the examples have not shown, another branch or a size that is not free, runs in torch.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from fastrec import kernels
from fastrec.errors import BackendError
from fastrec.exporters.trace import evaluated, owned, quiet, typed
from fastrec.measure.choice import choice
from fastrec.measure.timing import Tolerance, correctness_gate
from fastrec.runtime.backends._torch import TorchEngine
from fastrec.runtime.native.graphs import Plans, backend, collecting, learning, serving
from fastrec.runtime.threads import with_torch_threads
from fastrec.spec import InputSpec

# Batches beside the examples' own that parts are made for: two that share no size by chance, so
# that the batch is told from every other size, and a single user.
_BATCHES = (11, 13, 1)
_DYNAMO = {
    "allow_rnn": True,
    "assume_static_by_default": True,
    "automatic_dynamic_shapes": True,
    "recompile_limit": 64,
    "suppress_errors": False,
}


class Parts:
    """A model's forward as plans and torch ops.

    Args:
        model: in eval mode; copied.
        examples: of its inputs.
        spec: of its inputs.
        threads: that a call may use.
        torch_threads: the same for the ops that torch runs.
        tolerance: of the answers, which are held against the model's.

    Attributes:
        reasons: what torch runs, and why.
        batches: why other batch sizes run in torch ("" where they do not).

    Raises:
        BackendError: dynamo cannot trace the model, no part of it is a plan, or the answers differ.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[torch.Tensor],
        spec: InputSpec,
        *,
        threads: int,
        torch_threads: int,
        tolerance: Tolerance,
    ) -> None:
        with typed("a model that can't be copied"):
            own = owned(evaluated(model))
        self.threads, self.torch_threads = threads, torch_threads
        self.batches = ""
        traced = torch.compile(_own_code(own), backend=backend)
        with ExitStack() as held, quiet():
            held.enter_context(_calm())
            known = {k: v for k, v in _DYNAMO.items() if hasattr(torch._dynamo.config, k)}
            held.enter_context(torch._dynamo.config.patch(known))
            self._forward = traced
            requests = [tuple(examples)]
            for batch in _BATCHES if any("B" in f.dims for f in spec.fields) else ():
                given = _of_batch(examples, spec, batch)
                try:
                    with typed(f"the model refuses a batch of {batch}"), learning():
                        self._call(*_marked(given, spec))
                    requests.append(given)
                except BackendError as error:
                    self.batches = self.batches or str(error)
            self._made = held.enter_context(collecting())
            for given in requests:
                with typed("torch.compile can't trace this model"):
                    self._call(*_marked(given, spec))
        self._forward = torch._dynamo.run(traced)
        if not self.plans:
            why = "; ".join(self.reasons) or "dynamo captures no graph of it (a break in a loop?)"
            raise BackendError(f"no part of this model is a native plan: {why}")
        for given in requests:
            with torch.no_grad():
                wanted = own(*given).float().numpy()
            gate = correctness_gate(wanted, self(*given).numpy(), tolerance)
            gate.require("parts of this model")

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The scores, float32."""
        with serving():
            return self._call(*inputs)

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), kernels.call_threads(self.threads):
            scores: torch.Tensor = with_torch_threads(self.torch_threads, self._forward, *inputs)
        return scores

    @property
    def plans(self) -> list[Plans]:
        """The graphs that hold native plans, each once a set of weights."""
        return [p for _, p in self._made if p.cut is not None and p.cut.regions]

    @property
    def reasons(self) -> list[str]:
        """The ops that torch runs, and why."""
        found: list[str] = []
        for graph, plans in self._made:
            found += [graph.reason, graph.ended, *(plans.cut.reasons if plans.cut else ())]
        return [why for why in dict.fromkeys(found) if why]

    def rows(self) -> list[dict[str, Any]]:
        """For ``describe()``: each plan, then what torch runs."""
        plans = {
            f"{r.steps} steps of {', '.join(r.modules_held) or 'the forward'}": None
            for p in self.plans
            for r in (p.cut.regions if p.cut else ())
        }
        rows = [choice("plan", True, None, why) for why in plans] + self.torch_rows()
        if self.batches:
            rows.append(choice("free sizes", False, None, self.batches))
        return rows

    def torch_rows(self) -> list[dict[str, Any]]:
        """For ``describe()``: what torch runs, and why."""
        return [choice("torch", True, None, why) for why in self.reasons]

    def close(self) -> None:
        """Forget the plans."""
        for graph, plans in self._made:
            graph.drop(plans)
        self._made.clear()


class PartsEngine(TorchEngine):
    """Runs the parts of a model; what no plan holds, torch does."""

    def __init__(self, parts: Parts, **about: Any) -> None:
        super().__init__(parts, torch_threads=parts.torch_threads, **about)
        self._parts = parts

    def close(self) -> None:
        """Drop the plans and the model."""
        if not self._closed:
            self._parts.close()
            del self._parts
        super().close()


def _own_code(model: nn.Module) -> Callable[..., torch.Tensor]:
    """A call of the model whose code no other engine has: dynamo keeps what it made by code."""

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return model(*inputs).float()

    return types.FunctionType(
        call.__code__.replace(), call.__globals__, "call", None, call.__closure__
    )


def _of_batch(
    tensors: Sequence[torch.Tensor], spec: InputSpec, batch: int
) -> tuple[torch.Tensor, ...]:
    """The examples' users, repeated or cut to another number."""
    taken = []
    for tensor, f in zip(tensors, spec.fields, strict=True):
        if "B" in f.dims:
            dim = f.dims.index("B")
            tensor = tensor.index_select(dim, torch.arange(batch) % tensor.shape[dim])
        taken.append(tensor)
    return tuple(taken)


def _marked(tensors: Sequence[torch.Tensor], spec: InputSpec) -> tuple[torch.Tensor, ...]:
    """Copies whose free sizes dynamo is told of."""
    copies = tuple(t.clone() for t in tensors)
    for tensor, f in zip(copies, spec.fields, strict=True):
        for dim, size in enumerate(f.dims):
            if isinstance(size, str) and tensor.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return copies


class _calm:
    """Keeps dynamo's warnings of graph breaks, which the engine tells, from the user."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch._dynamo")
        self._before = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *raised: object) -> None:
        self._logger.setLevel(self._before)
