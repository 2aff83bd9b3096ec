"""Arrays of other libraries are taken and given back; fakes stand in for those on a GPU."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from fastrec import env
from fastrec.errors import ArgumentError
from fastrec.kernels import (
    dlpack,
    grouped_linear,
    separable_projection,
    sparse_int8_linear,
    window_sparse_attention,
)
from fastrec.kernels.sparse_int8_linear.samples import sample

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="nothing here is Triton's")


class Array:
    """DLPack and nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def test_numpy_in_numpy_out() -> None:
    (x, packed), kwargs = sample(3, 33, 36).make()
    expected = sparse_int8_linear(x, packed, **kwargs)
    y = sparse_int8_linear(x.numpy(), packed, **kwargs | {"bias": kwargs["bias"].numpy()})
    assert isinstance(y, np.ndarray)
    assert np.array_equal(y, expected.numpy())
    by_name = sparse_int8_linear(x_u8=x.numpy(), packed=packed, **kwargs)
    assert np.array_equal(by_name, expected.numpy())


def test_dlpack_in_tensor_out_and_nothing_is_copied() -> None:
    x = torch.randn(4, 6)
    taken = dlpack.tensor_of("x", Array(x))
    assert taken.data_ptr() == x.data_ptr()
    weight = torch.randn(2, 5, 3)
    y = grouped_linear(Array(x), Array(weight))
    assert isinstance(y, torch.Tensor)
    assert torch.equal(y, grouped_linear(x, weight))


@pytest.mark.parametrize(
    "function", [grouped_linear, separable_projection, sparse_int8_linear, window_sparse_attention]
)
def test_every_op_with_a_gpu_kernel_takes_arrays(function: Any) -> None:
    assert function.__wrapped__.__name__ == function.__name__


def test_an_array_that_torch_cannot_share_is_named() -> None:
    strings = np.array(["a"])
    with pytest.raises(ArgumentError, match="x_u8: expected an array whose memory"):
        sparse_int8_linear(x_u8=strings, packed=None, x_scale=1.0, x_zero_point=0)


def test_the_stream_of_a_cuda_array_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, waited = torch.zeros(2), []

    class OnGpu:
        __cuda_array_interface__ = {"stream": 77}  # noqa: RUF012

    current = types.SimpleNamespace(wait_stream=waited.append)
    monkeypatch.setattr(torch, "as_tensor", lambda value, device: x)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address: ("stream", address))
    assert dlpack.tensor_of("x", OnGpu()) is x
    assert waited == [("stream", 77)]


def test_cupys_current_stream_is_the_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    class Entered:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            entered.append(self.stream)

        def __exit__(self, *raised: object) -> None:
            entered.append(None)

    fake = types.ModuleType("cupy")
    stream = types.SimpleNamespace(ptr=99)
    fake.cuda = types.SimpleNamespace(get_current_stream=lambda: stream)  # type: ignore[attr-defined]
    fake.from_dlpack = lambda tensor: ("cupy", tensor)  # type: ignore[attr-defined]

    class CuPyArray(Array):
        def __array_namespace__(self) -> Any:
            return fake

    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address: address)
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    x, weight = torch.randn(4, 6), torch.randn(2, 5, 3)
    library, y = grouped_linear(CuPyArray(x), weight)
    assert library == "cupy"
    assert torch.equal(y, grouped_linear(x, weight))
    assert entered == [99, None]
    stream.ptr = 0
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
    grouped_linear(CuPyArray(x), weight)
    assert entered == [99, None, "default", None]
