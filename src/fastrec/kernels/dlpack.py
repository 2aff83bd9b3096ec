"""Arrays of other libraries as arguments of the public functions, without a copy: CuPy, NumPy, JAX,
anything with DLPack or ``__cuda_array_interface__``."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from fastrec.errors import ArgumentError

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_arrays(function: Function) -> Function:
    """Lets a public function take other libraries' arrays where it takes tensors.

    Results are arrays of the library that the first such argument comes from, where that follows
    the array API standard (``__array_namespace__``: CuPy, NumPy, JAX), else tensors, which speak
    both protocols. Kernels run on CuPy's current stream for CuPy's arrays, else on torch's, which
    waits for the stream that the array names.
    """

    @functools.wraps(function)
    def public(*args: Any, **kwargs: Any) -> Any:
        # The first argument decides in the usual case; the rest is for arrays given by name.
        if args and isinstance(args[0], torch.Tensor):
            return function(*args, **kwargs)
        foreign = [value for value in (*args, *kwargs.values()) if is_foreign(value)]
        if not foreign:
            return function(*args, **kwargs)
        namespace = _namespace(foreign[0])
        with _stream(namespace):
            there = [tensor_of(f"argument {i}", value) for i, value in enumerate(args)]
            named = {name: tensor_of(name, value) for name, value in kwargs.items()}
            return _returned(function(*there, **named), namespace)

    return cast(Function, public)


def is_foreign(value: Any) -> bool:
    """Whether this is another library's array."""
    if isinstance(value, torch.Tensor):
        return False
    return hasattr(value, "__dlpack__") or hasattr(value, "__cuda_array_interface__")


def tensor_of(name: str, value: Any) -> Any:
    """A tensor of another library's array, in the same memory; any other value as it is.

    Raises:
        ArgumentError: torch can't take it over (read-only memory, a dtype it does not know).
    """
    if not is_foreign(value):
        return value
    try:
        if hasattr(value, "__dlpack__"):
            return torch.from_dlpack(value)
        interface = value.__cuda_array_interface__
        tensor = torch.as_tensor(value, device="cuda")
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(name, "an array whose memory torch can share", error) from error
    stream = interface.get("stream")
    # 1 and 2 name the default streams, which torch's own wait for.
    if stream not in (None, 1, 2):
        torch.cuda.current_stream().wait_stream(torch.cuda.ExternalStream(stream))
    return tensor


def _namespace(value: Any) -> Any:
    """The library of an array, None where it does not say."""
    get = getattr(value, "__array_namespace__", None)
    return None if get is None else get()


def _stream(namespace: Any) -> contextlib.AbstractContextManager[Any]:
    """Makes CuPy's current stream torch's."""
    cupy = sys.modules.get("cupy")
    if cupy is None or namespace is not cupy:
        return contextlib.nullcontext()
    address = cupy.cuda.get_current_stream().ptr
    stream = torch.cuda.ExternalStream(address) if address else torch.cuda.default_stream()
    return torch.cuda.stream(stream)


def _returned(result: Any, namespace: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_returned(part, namespace) for part in result)
    if isinstance(result, torch.Tensor) and hasattr(namespace, "from_dlpack"):
        return namespace.from_dlpack(result.detach())
    return result
