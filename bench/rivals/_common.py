"""Helpers of all rivals: engines at their best settings.

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


def named(calls: Mapping[str, Call | None] | None = None, **more: Call | None) -> dict[str, Call]:
    """The rivals that there are, without the ones that are None ("_" reads as a blank)."""
    given = {**(calls or {}), **{name.replace("_", " "): call for name, call in more.items()}}
    return {name: call for name, call in given.items() if call is not None}


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


def quantised(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """torch's own quint8 tensor, which its int8 layers take: one fused pass."""
    return torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)


def codes(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """The same codes in steps that a compiler fuses, as uint8."""
    return torch.clamp(torch.round(x * (1 / scale)) + zero_point, 0, 255).to(torch.uint8)


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


def onnx_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, threads: int
) -> dict[str, Call]:
    """softmax(q k^T / sqrt(D) + bias) v as a graph for ONNX Runtime and OpenVINO."""
    try:
        from onnx import helper
    except ImportError:
        return {}
    node = helper.make_node
    feed = {name: x.contiguous().numpy() for name, x in (("q", q), ("k", k), ("v", v))}
    constants = {"scale": np.float32(q.shape[-1] ** -0.5)}
    nodes = [
        node("Mul", ["q", "scale"], ["scaled"]),
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["scaled", "kt"], ["scores"]),
    ]
    if bias is not None:
        constants["bias"] = bias.float().expand(1, 1, q.shape[2], k.shape[2]).numpy()
        nodes.append(node("Add", ["scores", "bias"], ["seen"]))
    nodes += [
        node("Softmax", ["scores" if bias is None else "seen"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["y"]),
    ]
    model = onnx_model(nodes, feed, {"y": (np.float32, tuple(q.shape))}, constants)
    return named(
        onnxruntime=onnxruntime_call(model, feed, threads),
        openvino=openvino_call(model, feed, threads),
    )
