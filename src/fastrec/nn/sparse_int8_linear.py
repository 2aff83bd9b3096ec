"""``SparseInt8Linear``: a drop-in for ``nn.Linear`` on the ``sparse_int8_linear`` kernel."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.kernels._compiled import Signature
from fastrec.kernels._gpu import ceil_div
from fastrec.kernels.sparse_int8_linear import (
    BACKENDS,
    _cpu,
    _gpu,
    check_epilogue,
    check_input,
    check_numbers,
    check_quantisation,
)
from fastrec.kernels.sparse_int8_linear.packed import PANEL_OUTPUTS, PackedWeight
from fastrec.kernels.sparse_int8_linear.reference import sparse_int8_linear_reference

# Buffers that may be None, and buffers whose length depends on what was pruned.
_OPTIONAL = ("bias", "out_scale", "out_zero_point")
_RESIZABLE = ("values", "group_index", *_OPTIONAL)
_BUFFERS = (*_RESIZABLE, "panel_start", "w_scale", "x_scale", "x_zero_point")
# Others (fake tensors, functional wrappers) have no memory for a kernel to read.
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
_SOURCE = "_fastrec_source"  # on bytes: the float tensor with a gradient that they came of


@dataclass(frozen=True)
class WeightFacts:
    """Dtype, device and shape of an INT8 layer's weight, whose values are no float tensor."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, int]


class _NoBackward(torch.autograd.Function):
    """Hands ``y`` on as a result of ``x``, through which no gradient can flow."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ArgumentError(
            "model",
            "fake-quantised layers for training: quantize_(model, QAT('prepare')), train, then "
            "QAT('convert'); or torch.no_grad() and .detach() where nothing before is trained",
            "a gradient that would have to pass through a static INT8 layer",
        )


def _without_gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``y``, of which a backward pass that should reach ``x`` raises.

    Bytes have no gradient: in a chain of layers they carry the tensor that the first one was given.
    """
    if x.requires_grad:
        source = x
    elif x.dtype is not torch.uint8 or (source := getattr(x, _SOURCE, None)) is None:
        return y
    if y.is_floating_point():
        return _NoBackward.apply(source, y)
    setattr(y, _SOURCE, source)
    return y


class SparseInt8Linear(nn.Module):
    """y = act(x W^T + b) with u8 activations and block-sparse s8 weights; inference only.

    Input uint8, float32 or bfloat16 [..., in_features]; output float32 (or bfloat16), or uint8
    once :meth:`set_output_quantization` was called (for a quantised consumer). Made by
    :meth:`from_float`; a new instance holds the zero weight, ready for ``load_state_dict``.

    Args:
        in_features: K, at most 65,793 (exact int32 accumulation).
        out_features: N.
        bias: whether there is a bias, added before the activation.
        activation: None, "relu" or "gelu", fused into the kernel.
        out: None for a float32 output, "bfloat16" for that; part of the architecture, as the
            activation is, so not in the state dict.

    Weights and scales are read when the layer first runs: replace its buffers, load a state dict
    or call the setters to change them later, rather than writing to them in place.
    """

    values: torch.Tensor
    group_index: torch.Tensor
    panel_start: torch.Tensor
    w_scale: torch.Tensor
    bias: torch.Tensor | None
    x_scale: torch.Tensor
    x_zero_point: torch.Tensor
    out_scale: torch.Tensor | None
    out_zero_point: torch.Tensor | None
    # Made at the first call: the checked weight, what runs it, and what that borrows.
    _packed: PackedWeight | None
    _run: _cpu.Run | None
    _prepared: tuple[_gpu.Prepared, str] | None
    _bias_of_run: torch.Tensor | None
    _out_dtype: torch.dtype

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        out: str | None = None,
    ) -> None:
        super().__init__()
        if out not in (None, "bfloat16"):
            raise ArgumentError("out", "None or 'bfloat16'", out)
        self.out = out
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        panels = ceil_div(out_features, PANEL_OUTPUTS)
        self.register_buffer("values", torch.zeros(0, 128, dtype=torch.int8))
        self.register_buffer("group_index", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("panel_start", torch.zeros(panels + 1, dtype=torch.int32))
        self.register_buffer("w_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("x_scale", torch.tensor(1.0))
        self.register_buffer("x_zero_point", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("out_scale", None)
        self.register_buffer("out_zero_point", None)
        self._forget()

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        calibration: Iterable[torch.Tensor] | None = None,
        x_scale: float | None = None,
        x_zero_point: int | None = None,
        activation: str | None = None,
        w_scale: torch.Tensor | None = None,
        out: str | None = None,
    ) -> SparseInt8Linear:
        """Quantises a float layer; groups of 32 outputs x 4 inputs that are all zero are dropped.

        Args:
            linear: the float layer.
            calibration: float inputs [..., K] whose range sets x_scale and x_zero_point; or
            x_scale, x_zero_point: the input's quantisation, given.
            activation: None, "relu" or "gelu", to fuse.
            w_scale: float32 [N]; by default the largest |w| of each output / 127.
            out: None for a float32 output, or "bfloat16".

        Raises:
            ArgumentError: neither or both of calibration and x_scale; NaNs; K too large.
        """
        if (calibration is None) == (x_scale is None):
            raise ArgumentError("calibration", "either calibration or x_scale", "both or neither")
        if calibration is not None:
            x_scale, x_zero_point = _affine_range(calibration, linear.in_features)
        assert x_scale is not None
        weight = linear.weight.detach().float().cpu()
        if not bool(torch.isfinite(weight).all()):
            raise ArgumentError("linear", "finite weights", "a NaN or an infinity")
        if w_scale is None:
            w_scale = weight.abs().amax(1) / 127
            w_scale = torch.where(w_scale > 0, w_scale, torch.ones_like(w_scale))
        w_scale = w_scale.detach().float().cpu()
        quantised = torch.round(weight / w_scale[:, None]).clamp(-127, 127).to(torch.int8)
        packed = PackedWeight.pack(quantised, w_scale)
        module = cls(
            linear.in_features, linear.out_features, linear.bias is not None, activation, out
        )
        module.values, module.group_index = packed.values, packed.group_index
        module.panel_start, module.w_scale = packed.panel_start, packed.scale
        if linear.bias is not None:
            module.bias = linear.bias.detach().float().cpu().contiguous().clone()
        module.set_input_quantization(x_scale, 0 if x_zero_point is None else x_zero_point)
        return module

    def set_input_quantization(self, scale: float, zero_point: int) -> None:
        """Real input = (u8 - zero_point) * scale; ArgumentError on a bad scale or zero point."""
        check_quantisation("x", scale, zero_point)
        self.x_scale = torch.tensor(scale, dtype=torch.float32)
        self.x_zero_point = torch.tensor(zero_point, dtype=torch.int32)

    def set_output_quantization(self, scale: float, zero_point: int) -> None:
        """Makes the output uint8: clip(round(y / scale) + zero_point, 0, 255)."""
        check_quantisation("out", scale, zero_point)
        self.out_scale = torch.tensor(scale, dtype=torch.float32)
        self.out_zero_point = torch.tensor(zero_point, dtype=torch.int32)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, checked once after every change."""
        if self._packed is None:
            self._packed = PackedWeight.from_parts(
                self.values,
                self.group_index,
                self.panel_start,
                self.w_scale,
                self.out_features,
                self.in_features,
            )
        return self._packed

    @property
    def density(self) -> float:
        """Share of the weight's 32 x 4 groups that is kept, 0..1."""
        return self.packed.density

    def dequantized_weight(self) -> torch.Tensor:
        """The real weight float32 [N, K] that the kernel computes with."""
        return self.packed.unpack().float() * self.w_scale[:, None]

    @property
    def weight(self) -> WeightFacts:
        """Dtype, device and shape of the float layer's weight, for parents that ask for them."""
        return WeightFacts(torch.float32, self.values.device, (self.out_features, self.in_features))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """uint8, float32 or bfloat16 [..., K] -> float32, bfloat16 or uint8 [..., N].

        Raises:
            ShapeError, DtypeError, DeviceError: wrong last dimension, dtype or device.
            ArgumentError: a NaN in a float input; a broken weight or scale after a bad load; in the
                backward pass, a gradient that should reach the input.
        """
        x = input
        if torch.compiler.is_compiling() or type(x) not in _PLAIN_TENSORS:
            return self._traced(x)
        run = self._run
        if run is None:
            run = self._prepare()
        shape = x.shape
        if not (
            x.is_cpu and x.dtype in _cpu.DTYPE_CODES and shape and shape[-1] == self.in_features
        ):
            check_input(x, self.in_features, self.values.device)
        if run is _elsewhere:
            y = self._run_elsewhere(x)
        else:
            y = _cpu.call(run, x, self.out_features, self._out_dtype)
        return _without_gradient(x, y) if torch.is_grad_enabled() else y

    def _epilogue(self) -> dict[str, Any]:
        return {
            "x_scale": self.x_scale.item(),
            "x_zero_point": int(self.x_zero_point),
            "bias": self.bias,
            "activation": self.activation,
            "out": self.out if self.out_scale is None else "uint8",
            "out_scale": None if self.out_scale is None else self.out_scale.item(),
            "out_zero_point": None if self.out_zero_point is None else int(self.out_zero_point),
        }

    def _prepare(self) -> _cpu.Run:
        epilogue = self._epilogue()
        check_quantisation("x", epilogue["x_scale"], epilogue["x_zero_point"])
        check_epilogue(
            self.out_features,
            self.bias,
            self.activation,
            epilogue["out_scale"],
            epilogue["out_zero_point"],
        )
        packed = self.packed
        chosen = BACKENDS.choose(Signature(self.values.device.type))
        run: _cpu.Run = _elsewhere
        if chosen in ("cuda", "triton"):
            self._prepared = _gpu.prepare(packed, **epilogue), chosen
        elif chosen == "cpu":
            self._bias_of_run = None if self.bias is None else self.bias.contiguous()
            run = _cpu.prepare(packed, **epilogue | {"bias": self._bias_of_run})
        self._out_dtype = _cpu.OUT_DTYPES[epilogue["out"]]
        self._run = run
        return run

    def _run_elsewhere(self, x: torch.Tensor) -> torch.Tensor:
        """Not by the compiled CPU kernel."""
        check_input(x, self.in_features, self.values.device)
        if self._prepared is not None:
            return _gpu.call(self._prepared[0], x, self._prepared[1])
        check_numbers(x)
        return sparse_int8_linear_reference(x, self.packed, **self._epilogue())

    def _traced(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastrec.sparse_int8_linear(
            x,
            self.values,
            self.group_index,
            self.panel_start,
            self.w_scale,
            self.bias,
            self.x_scale,
            self.x_zero_point,
            self.activation,
            self.out_scale,
            self.out_zero_point,
            out=self.out,
        )

    def _forget(self) -> None:
        self._packed = None
        self._run = None
        self._bias_of_run = None
        self._prepared = None
        self._out_dtype = torch.float32

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _BUFFERS and "_run" in self.__dict__:
            self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> SparseInt8Linear:
        # .to(dtype) must not touch the scales' float32.
        kept = {name: getattr(self, name) for name in ("w_scale", "bias", "x_scale", "out_scale")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after is not None and after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        self._forget()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in _RESIZABLE:
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, torch.empty_like(stored, device=self.values.device))
            elif name in _OPTIONAL:
                setattr(self, name, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._forget()
        try:
            _ = self.packed
            self._prepare()
        except (ArgumentError, DtypeError, ShapeError) as error:
            error_msgs.append(f"{prefix}{error}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None, "_run": None, "_bias_of_run": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseInt8Linear:
        copy = SparseInt8Linear(
            self.in_features, self.out_features, self.bias is not None, self.activation, self.out
        )
        for name, buffer in self._buffers.items():
            # Through the memo, so that a caller may share the tensors between copies.
            setattr(copy, name, deepcopy(buffer, memo))
        copy.train(self.training)
        memo[id(self)] = copy
        return copy

    def extra_repr(self) -> str:
        out = "uint8" if self.out_scale is not None else self.out or "float32"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation}, "
            f"density={self.density:.3f}, out={out}"
        )


def _elsewhere(x: int, dtype: int, elements: int, result: int) -> bool:
    raise AssertionError("stands for the reference, which takes tensors")


def _affine_range(calibration: Iterable[torch.Tensor], inputs: int) -> tuple[float, int]:
    """u8 scale and zero point that cover [min(0, min x), max(0, max x)]."""
    low, high = 0.0, 0.0
    seen = False
    for x in calibration:
        if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != inputs:
            raise ShapeError("calibration", f"float tensors [..., {inputs}]", list(x.shape))
        if not bool(torch.isfinite(x).all()):
            raise ArgumentError("calibration", "finite values", "a NaN or an infinity")
        seen = seen or x.numel() > 0
        if x.numel():
            low, high = min(low, float(x.min())), max(high, float(x.max()))
    if not seen:
        raise ArgumentError("calibration", "at least one value", "none")
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)
