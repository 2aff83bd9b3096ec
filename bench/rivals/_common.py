"""What the ops' rivals share: engines at their best settings.

An engine that is not installed yields no rival (``None``); one that is installed and fails raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

import rivals

Call = Callable[[], Any]
WARM_CALLS = 3


def named(**calls: Call | None) -> dict[str, Call]:
    """The rivals that there are, by name ("_" reads as a blank)."""
    return {name.replace("_", " "): call for name, call in calls.items() if call is not None}


def other_work(what: str, call: Call) -> Call:
    """``call``, marked as computing something else than the op, such as "every key"."""

    def marked() -> Any:
        return call()

    marked.other_work = what  # type: ignore[attr-defined]
    return marked


def compiled(function: Callable[..., Any], *args: Any) -> Call | None:
    """``function(*args)`` through torch.compile (Inductor), compiled and warm, shapes static; None
    in a quick run."""
    if not rivals.COMPILE:
        return None
    run = torch.compile(function, fullgraph=True, dynamic=False)

    def call() -> Any:
        return run(*args)

    with warnings.catch_warnings():
        # Inductor and its imports warn of their own deprecations.
        warnings.simplefilter("ignore")
        for _ in range(WARM_CALLS):
            call()
    return call


def forward_backward(
    function: Callable[..., torch.Tensor], leaves: Sequence[torch.Tensor], *rest: Any
) -> Call:
    """``function(*leaves, *rest)`` and its gradients by the leaves; returns (output, *gradients).

    Every engine of a case gets the same upstream gradient, drawn once by the output's shape.
    """
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    upstream: list[torch.Tensor] = []

    def call() -> tuple[torch.Tensor, ...]:
        out = function(*own, *rest)
        if not upstream:
            generator = torch.Generator().manual_seed(1)
            upstream.append(torch.randn(out.shape, generator=generator).to(out.dtype))
        return (out.detach(), *torch.autograd.grad(out, own, upstream[0]))

    return call


def onnx_model(
    nodes: Sequence[Any],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, tuple[type | np.dtype[Any], Sequence[int]]],
    constants: Mapping[str, np.ndarray],
    *,
    opset: int = 17,
) -> bytes | None:
    """A checked graph with static shapes, serialised; None where onnx is not installed.

    Args:
        nodes: ``onnx.helper.make_node`` results.
        inputs: example of each input: its dtype and shape are the graph's.
        outputs: dtype and shape of each output.
        constants: weights, scales and zero points.
    """
    try:
        import onnx
    except ImportError:
        return None
    from onnx import helper, numpy_helper

    def info(name: str, dtype: Any, shape: Sequence[int]) -> Any:
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, code, list(shape))

    graph = helper.make_graph(
        list(nodes),
        "op",
        [info(name, array.dtype, array.shape) for name, array in inputs.items()],
        [info(name, dtype, shape) for name, (dtype, shape) in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def onnxruntime_call(
    model: bytes | None, feed: Mapping[str, np.ndarray], threads: int
) -> Call | None:
    """ONNX Runtime on a model of :func:`onnx_model`; returns the first output.

    Its defaults are its best here: all optimisations, sequential execution, workers that spin.
    """
    if model is None:
        return None
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = dict(feed)
    return lambda: session.run(None, feed)[0]


def openvino_call(model: bytes | None, feed: Mapping[str, np.ndarray], threads: int) -> Call | None:
    """OpenVINO on a model of :func:`onnx_model`; returns the first output.

    Latency hint, one stream, inputs and outputs shared instead of copied, fp32 kept fp32.
    """
    if model is None:
        return None
    try:
        import openvino
    except ImportError:
        return None
    core = openvino.Core()
    request = core.compile_model(
        core.read_model(model),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
        },
    ).create_infer_request()
    feed = dict(feed)
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]
