"""Uses of a layer's weight outside of its own call, and randomness that eval mode leaves on.

A score ``h @ table.weight.T`` reads a table without calling it, so an INT8 table in its place would
break or bend it. The uses are found by watching every torch function of one forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastrec.compress.layers import weight_obstacle, weight_of
from fastrec.errors import ArgumentError
from fastrec.nn import GroupedLinear

# Properties of a weight that its INT8 module answers as the float one does.
_ANSWERED: dict[type[nn.Module], set[str]] = {
    nn.Linear: {"dtype", "device", "shape"},
    GroupedLinear: {"dtype", "device"},
    nn.Embedding: {"device", "shape", "ndim", "is_cpu", "is_cuda"},
}
_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout,
}  # fmt: skip


class WeightWatch(TorchFunctionMode):
    """While active, collects in ``found`` the layers whose weight is used outside of their call.

    Args:
        layers: name -> layer, those to watch.
        evaluates: whether dropout that is on is an error.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, evaluates: bool) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._evaluates = evaluates
        self._owners: dict[int, list[str]] = {}
        self._answered: dict[str, set[str]] = {}
        self._called: list[int] = []  # ids of the weights of the layers that run, innermost last
        for name, layer in layers.items():
            if weight_obstacle(layer) is not None:
                continue  # a weight that is computed for every call has no identity
            self._owners.setdefault(id(weight_of(layer)), []).append(name)
            kinds = [kind for kind in _ANSWERED if isinstance(layer, kind)]
            self._answered[name] = _ANSWERED[kinds[0]] if kinds else set()

    @contextmanager
    def running(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Active, with hooks that say which layer is being called."""
        with ExitStack() as stack:
            for layer in layers.values():
                stack.callback(layer.register_forward_pre_hook(self._enter).remove)
                leave = layer.register_forward_hook(self._leave, always_call=True)
                stack.callback(leave.remove)
            stack.enter_context(self)
            yield

    def _enter(self, layer: nn.Module, args: Any) -> None:
        self._called.append(id(weight_of(layer)))

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._called.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._evaluates and func in _DROPOUTS:
            _refuse_dropout(func, args, kwargs)
        for value in [*args, *kwargs.values()]:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor) and id(tensor) in self._owners:
                    self._note(id(tensor), func)
        return func(*args, **kwargs)

    def _note(self, weight: int, func: Callable[..., Any]) -> None:
        if self._called and self._called[-1] == weight:
            return
        # A property such as Tensor.dtype comes as its descriptor's __get__.
        descriptor = getattr(func, "__self__", None)
        attribute = descriptor.__name__ if inspect.isgetsetdescriptor(descriptor) else None
        name = attribute or getattr(func, "__name__", str(func))
        for owner in self._owners[weight]:
            if attribute not in self._answered[owner]:
                self.found.setdefault(
                    owner, f"its weight is also used outside of its own call ({name})"
                )


def _refuse_dropout(func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    named = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    named.setdefault("p", named.get("train", 0.5))
    if named.get("training", True) and named["p"] > 0:
        raise ArgumentError(
            "model",
            "a model without randomness in eval mode: F.dropout(x, p, training=self.training)",
            f"{func.__name__} that is always on",
        )


def uses_outside_calls(
    model: nn.Module, layers: Mapping[str, nn.Module], call: Callable[[], Any]
) -> dict[str, str]:
    """Name -> reason, of the layers whose weight ``call`` uses without calling them.

    Args:
        model: in eval mode.
        layers: name -> layer, those to watch.
        call: one forward pass of ``model``.

    Raises:
        ArgumentError: dropout that eval mode leaves on, or a buffer that the pass changes (it has
            its old value again).
    """
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    watch = WeightWatch(layers, evaluates=True)
    with watch.running(layers):
        call()
    for name, now in model.named_buffers():
        buffer, before = buffers.get(name, (now, now))
        # a cache that grows or is made in the first call is no state
        if now.shape == before.shape and not bool(((now == before) | (now != now)).all()):
            buffer.copy_(before)
            _set_buffer(model, name, buffer)
            raise ArgumentError(
                "model", "buffers that a call in eval mode leaves as they are", f"{name!r} changes"
            )
    return watch.found


def _set_buffer(model: nn.Module, name: str, buffer: Tensor) -> None:
    """Put a buffer under its full name."""
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, buffer)
