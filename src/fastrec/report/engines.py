"""The engines that a variant is measured on; one that fails to build does not end the run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastrec.errors import FastrecError
from fastrec.measure.timing import Agreement, Tolerance, correctness_gate
from fastrec.report.networks import float_reference
from fastrec.report.settings import Table1Settings
from fastrec.runtime import Engine, compile

Request = tuple[np.ndarray, ...]

OWN_TOOLS = "quantises the same float network with its own tools"
ITS_FP16 = "weights and tables in float16, widened when used"


@dataclass(frozen=True)
class Spec:
    """One row's engine: the backend, the precision of the row, and the network that it is given.

    Args:
        engine, precision: as in the row.
        network: name of a network (a variant, or ``distilled_fp32``).
        ask: precision asked of :func:`fastrec.compile`; None = the network as it is.
        note: what a reader has to know about the row.
    """

    engine: str
    precision: str
    network: str
    ask: str | None
    note: str = ""

    @property
    def name(self) -> str:
        """Unique within a variant."""
        return f"{self.engine}-{self.precision}"

    @property
    def key(self) -> tuple[str, str | None, str]:
        """The same for rows of several variants that run the same network the same way."""
        return self.engine, self.ask, self.network


def specs_of(variant: str, settings: Table1Settings) -> list[Spec]:
    """The engines of a variant, those asked for."""
    if variant in ("baseline", "pruned"):
        specs = [
            Spec("native", "fp32", variant, None),
            Spec("torch", "fp32", variant, "fp32"),
            Spec("torch_compile", "fp32", variant, "fp32"),
            Spec("onnxruntime", "fp32", variant, "fp32"),
            Spec("openvino", "fp32", variant, "fp32"),
            Spec("openvino", "bf16", variant, "bf16"),
            Spec("litert", "fp32", variant, "fp32"),
            Spec("cuda", "fp32", variant, None),
            Spec("tensorrt", "fp32", variant, "fp32"),
            Spec("tensorrt", "fp16", variant, "fp16"),
        ]
    elif variant == "distilled":
        specs = [
            Spec("native", "bf16", variant, None),
            Spec("torch", "bf16", variant, "bf16"),
            Spec("torch_compile", "bf16", variant, "bf16"),
            Spec("onnxruntime", "fp32", "distilled_fp32", "fp32", "no bf16 on its CPU provider"),
            Spec("openvino", "bf16", "distilled_fp32", "bf16"),
            Spec("litert", "fp16", "distilled_fp32", "fp16", ITS_FP16),
            Spec("cuda", "bf16", "distilled_fp32", "bf16"),
            Spec("tensorrt", "fp16", "distilled_fp32", "fp16"),
        ]
    else:
        network = "baseline" if variant == "quantized" else "pruned"
        no_int8 = "no INT8 of its own on CPU: the float network of this variant"
        specs = [
            Spec("native", "int8", variant, None, "made by fastrec.quantize_"),
            Spec("torch", "int8", network, "int8", OWN_TOOLS),
            Spec("torch_compile", "fp32", network, "fp32", no_int8),
            Spec("torch_compile", "bf16", network, "bf16", no_int8),
            Spec("onnxruntime", "int8", network, "int8", OWN_TOOLS),
            Spec("openvino", "int8", network, "int8", f"{OWN_TOOLS} on the same calibration data"),
            Spec("litert", "int8", variant, None, "made by fastrec.quantize_"),
            Spec("cuda", "int8", variant, None, "made by fastrec.quantize_"),
            Spec("tensorrt", "int8", variant, None, "made by fastrec.quantize_"),
        ]
    if settings.quick:
        specs = [s for s in specs if not _slow_or_told_already(s, variant)]
    return [spec for spec in specs if spec.engine in settings.engines]


def _slow_or_told_already(spec: Spec, variant: str) -> bool:
    """Whether the demo leaves a row out: torch.compile takes half a minute a network, zeros do not
    make it faster, and OpenVINO in bf16 is in the distilled variant."""
    if spec.engine == "torch_compile":
        return variant not in ("baseline", "distilled")
    return (spec.engine, spec.precision) == ("openvino", "bf16") and variant != "distilled"


@dataclass
class Built:
    """An engine, or why it could not be built; and how it agreed with fp32 torch."""

    spec: Spec
    engine: Engine | None = None
    why: str | None = None
    gate: dict[str, Any] | None = None
    build_s: float = 0.0

    @property
    def usable(self) -> bool:
        """Built, and its answers are right."""
        return self.engine is not None and self.why is None

    def settings(self) -> str:
        """Settings that the engine chose, its kernels and versions, and the spec's note."""
        parts = []
        if self.engine is not None:
            rows = self.engine.describe()
            parts = [str(row["setting"]) for row in rows if row.get("chosen")]
            kernels = sorted({str(row["kernel"]) for row in rows if row.get("kernel")})
            if kernels:
                parts.append(f"kernels: {', '.join(kernels)}")
            parts += [f"{name} {v}" for name, v in self.engine.versions().items() if name != "isa"]
        return "; ".join([*parts, self.spec.note] if self.spec.note else parts)


def attempt(
    what: str, action: Callable[..., Any], *args: Any, **keywords: Any
) -> tuple[Any, str | None]:
    """Return ``action``'s result, or the reason why it failed, which starts with ``what``.

    The one place that catches every exception: third-party compilers and quantisers fail in ways of
    their own, and one of them must not cost the reader the other rows. What failed is in the table
    with this reason; Ctrl-C, exit and out-of-memory kills still end the run.
    """
    try:
        return action(*args, **keywords), None
    except FastrecError as error:
        return None, f"{what}: {error}"
    except Exception as error:  # see above
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, f"{what}: {type(error).__name__}: {lines[0] if lines else 'no message'}"


@contextmanager
def third_party_output(log: Path) -> Iterator[None]:
    """Send what is printed, by C++ too, to a file: nothing is lost and the progress bars stay.

    Errors are exceptions and pass through.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("a") as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, kept in zip((1, 2), saved, strict=True):
                os.dup2(kept, target)
                os.close(kept)


@dataclass
class EngineBuilder:
    """Builds engines and checks their scores; keeps those that several variants share.

    Args:
        networks: name -> model.
        requests: batch size -> requests (tuples of arrays), real ones of the test split.
        calibration: requests for rivals' quantisers.
    """

    networks: dict[str, nn.Module]
    requests: Mapping[int, Sequence[Request]]
    calibration: Sequence[Request]
    threads: int
    log: Path
    shared: dict[tuple[Any, ...], Built] = field(default_factory=dict)
    references: dict[str, nn.Module] = field(default_factory=dict)

    def built(self, spec: Spec, batch: int, check: Sequence[int]) -> Built:
        """The engine for ``spec``, its settings chosen at ``batch``, checked at sizes ``check``."""
        key = (*spec.key, batch, *check)
        if key in self.shared:
            kept = self.shared[key]
            return Built(spec, kept.engine, kept.why, kept.gate, kept.build_s)
        start = time.perf_counter()
        result = Built(spec)
        with third_party_output(self.log):
            result.engine, result.why = attempt("building it failed", self._make, spec, batch)
            if result.engine is not None:
                self._check(result, check)
        result.build_s = time.perf_counter() - start
        if spec.engine == "torch_compile":  # the slowest to build
            self.shared[key] = result
        return result

    def _make(self, spec: Spec, batch: int) -> Engine:
        return compile(
            self.networks[spec.network],
            self.requests[batch][0],
            spec.engine,
            self.threads,
            precision=spec.ask,
            calibration=self.calibration if spec.ask == "int8" else None,
        )

    def _check(self, result: Built, batches: Sequence[int]) -> None:
        """The correctness gate: before any timing, at every batch size that will be timed."""
        engine, spec = result.engine, result.spec
        assert engine is not None
        worst: Agreement | None = None
        for batch in batches:
            inputs = self.requests[batch][0]
            scores, why = attempt("it failed on a request", engine, *inputs)
            if why is not None:
                result.why = why
                return
            tolerance = Tolerance.for_precision(spec.precision)
            found = correctness_gate(self.reference(spec.network, inputs), scores, tolerance)
            if worst is None or not found.passed or found.noise > worst.noise:
                worst = found
            if not found.passed:
                break
        assert worst is not None
        result.gate = worst.to_dict()
        if worst.reason is not None:
            result.why = (
                f"its answers differ from fp32 torch's, so it was not timed: {worst.reason}"
            )

    def reference(self, network: str, inputs: Request) -> np.ndarray:
        """Scores of the network's float32 torch reference, float32 [B, m]."""
        import torch

        if network not in self.references:
            self.references[network] = float_reference(self.networks[network])
        with torch.inference_mode():
            tensors = [torch.from_numpy(np.array(a)) for a in inputs]
            scores: np.ndarray = self.references[network](*tensors).float().numpy()
        return scores

    def close_shared(self) -> None:
        """Free the engines that variants share."""
        for built in self.shared.values():
            if built.engine is not None:
                built.engine.close()
        self.shared.clear()

    def close(self, built: Sequence[Built]) -> None:
        """Free engines that no other variant uses."""
        kept = {id(b.engine) for b in self.shared.values()}
        for b in built:
            if b.engine is not None and id(b.engine) not in kept:
                b.engine.close()
