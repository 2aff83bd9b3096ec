"""OpenVINO on the CPU: fp32, bf16, and int8 by nncf, as a rival at its best.

Measured on the canonical ranker: converting the torch model is as fast as going through ONNX; int8
runs best with static shapes and the rest in f32 or bf16 (they tie), else dynamic with f32. Which of
these wins depends on machine and batch, so the build measures them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import queue
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrec import env
from fastrec.errors import BackendError, MissingDependencyError, not_installed
from fastrec.measure.choice import choice, fastest
from fastrec.measure.machine import int8_products_saturate
from fastrec.measure.packages import missing, package_versions
from fastrec.runtime import artifact
from fastrec.runtime.backends._openvino_rounding import round_before_quantising
from fastrec.runtime.cache import digest
from fastrec.runtime.engine import BuildOptions, Engine
from fastrec.spec import InputSpec

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "bf16", "int8")
_MODEL = "model.xml"
# precision -> (shapes, INFERENCE_PRECISION_HINT) tried, most likely best first.
_CANDIDATES = {
    "fp32": (("dynamic", "f32"), ("static", "f32")),
    "bf16": (("static", "bf16"), ("dynamic", "bf16")),
    "int8": (("static", "f32"), ("static", "bf16"), ("dynamic", "f32")),
}


def can_run() -> str | None:
    """None, or why not."""
    if missing("openvino"):
        return not_installed("openvino", "openvino")
    return None


def versions() -> dict[str, str]:
    """Versions of the packages that a build uses."""
    return package_versions("openvino", "nncf", "torch")


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError("openvino", "openvino", "OpenVINO") from error
    return openvino


def _cache_folder() -> Path:
    """Where compiled models lie: a folder a CPU and version, so that none of another machine's is
    ever read, whatever OpenVINO itself would make of it."""
    from fastrec.measure.machine import cpu_identity

    return env.cache_dir() / "openvino" / digest([cpu_identity(), versions()["openvino"]])


def int8_properties() -> dict[str, str]:
    """Properties for a model that ``fastrec.quantize_`` made, on this CPU.

    Without VNNI OpenVINO's u8 x s8 products saturate in int16 (the canonical ranker's top 10 was
    the same in 17 % of requests), and it has no exact int8 there; the same integers are then
    multiplied in float32, where a layer's sums are exact up to K = 518 and rounded at 2^-24 beyond.
    nncf's own models keep to 7-bit weights instead.
    """
    return {"LP_TRANSFORMS_MODE": "NO"} if int8_products_saturate() else {}


class _Requests:
    """Infer requests of one compiled model; a call takes one, and waits where all are taken."""

    def __init__(self, compiled: Any, count: int) -> None:
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(compiled.create_infer_request())

    def infer(self, arrays: list[np.ndarray]) -> np.ndarray:
        request = self._free.get()
        try:
            result = request.infer(arrays, share_inputs=True, share_outputs=True)
            # Shared memory is overwritten by the next call: the caller gets a copy, of few numbers.
            scores: np.ndarray = result[0].copy()
            return scores
        finally:
            self._free.put(request)


class OpenVinoEngine(Engine):
    """A compiled model for the example's shapes, and one with a free batch for all others."""

    # Its workers spin for 1 ms after an inference, measured.
    spin_s = 0.003

    def __init__(
        self,
        model: Any,
        *,
        shapes: str,
        hint: str,
        static_shapes: Sequence[Sequence[int]],
        own_int8: bool = False,
        mode: str = "latency",
        cache: bool = False,
        **about: Any,
    ) -> None:
        super().__init__(**about)
        self._model = model
        self._mode, self._cache = mode, cache
        self._own_int8 = own_int8
        self._shapes, self._hint = shapes, hint
        self._static_shapes = tuple([tuple(s) for s in static_shapes])
        self._static: Any = None
        self._dynamic: Any = None
        self._streams: Any = None
        if shapes == "static":
            self._static = self._request(self._static_shapes)
        else:
            self._dynamic = self._request(None)

    def _compile(self, shapes: Sequence[Sequence[int]] | None, config: dict[str, Any]) -> Any:
        ov = _openvino()
        model = self._model
        if shapes is not None:
            model = model.clone()
            model.reshape(dict(zip(model.inputs, map(ov.PartialShape, shapes), strict=True)))
        if self._cache:
            config = {**config, "CACHE_DIR": str(_cache_folder())}
        try:
            return ov.Core().compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_NUM_THREADS": self.threads,
                    "INFERENCE_PRECISION_HINT": self._hint,
                    **(int8_properties() if self._own_int8 else {}),
                    **config,
                },
            )
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot compile the model: {error}") from error

    def _request(self, shapes: Sequence[Sequence[int]] | None) -> _Requests:
        if self._mode == "latency":
            return _Requests(self._compile(shapes, {"PERFORMANCE_HINT": "LATENCY"}), 1)
        compiled = self._compile(shapes, self._streams_config())
        return _Requests(compiled, compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))

    def _streams_config(self) -> dict[str, Any]:
        return {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": self.threads}

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        requests = self._static
        if requests is None or tuple([a.shape for a in arrays]) != self._static_shapes:
            if self._dynamic is None:
                self._dynamic = self._request(None)
            requests = self._dynamic
        return requests.infer(arrays)

    def throughput(
        self, requests: Sequence[tuple[np.ndarray, ...]], *, seconds: float = 2.0
    ) -> float:
        """THROUGHPUT hint, one stream per thread, an AsyncInferQueue kept full."""
        import time

        ov = _openvino()
        if not requests:
            return super().throughput(requests, seconds=seconds)
        arrays = [self.spec.check(request)[0] for request in requests]
        static = self._shapes == "static" and all(
            tuple([a.shape for a in request]) == self._static_shapes for request in arrays
        )
        compiled = self._compile(self._static_shapes if static else None, self._streams_config())
        queue = ov.AsyncInferQueue(compiled, self.threads)
        for request in arrays[:2]:
            queue.start_async(request, share_inputs=True)
        queue.wait_all()
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            queue.start_async(arrays[done % len(arrays)], share_inputs=True)
            done += 1
        queue.wait_all()
        return done / (time.perf_counter() - start)

    def save(self, path: str | Path) -> Path:
        """Write OpenVINO's IR with its header; see :func:`fastrec.runtime.load_engine`."""
        ov = _openvino()
        header = self._header()
        header["settings"] = {
            "shapes": self._shapes,
            "hint": self._hint,
            "static_shapes": [list(s) for s in self._static_shapes],
            "own_int8": self._own_int8,
            "mode": self._mode,
            "cache": self._cache,
        }
        return artifact.write(
            path,
            header,
            lambda folder: ov.save_model(self._model, folder / _MODEL, compress_to_fp16=False),
        )

    def close(self) -> None:
        """Free the compiled models."""
        super().close()
        self._model = self._static = self._dynamic = None


def build(
    model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """Convert, quantise if asked, compile the candidates and keep the fastest.

    Settings: ``shapes`` ("static" or "dynamic"), ``hint`` ("f32" or "bf16", the precision of what
    is not int8), ``free_sizes`` ("batch", or "all": history and candidates stay free too), ``mode``
    ("latency", or "throughput": a stream a thread, for callers on several threads), ``cache`` ("on"
    keeps compiled models in the user's cache), ``rounding`` ("exact", or "fast": OpenVINO's own,
    for what ``fastrec.quantize_`` made).
    """
    import torch

    from fastrec.exporters.model_spec import precision_of
    from fastrec.exporters.onnx.export import static_shapes

    options.allow("shapes", "hint", "free_sizes", "mode", "cache", "rounding")
    exact = options.setting("rounding", ("exact", "fast"), "exact") == "exact"
    mode = options.setting("mode", ("latency", "throughput"), "latency")
    cache = options.setting("cache", ("on", "off"), "off") == "on"
    free_sizes = options.setting("free_sizes", ("batch", "all"), "batch")
    shapes = options.setting("shapes", ("static", "dynamic"))
    hint = options.setting("hint", ("f32", "bf16"))
    precision, own = precision_of(model, options.precision, "openvino")
    converted = _convert(model, example_inputs, free_sizes, exact)
    if options.precision == "int8":
        calibration = options.calibration or [tuple(t.numpy() for t in example_inputs)]
        converted = _quantise(converted, calibration)
    # What quantize_ made answers as it does elsewhere: bf16 between its layers must be asked for.
    candidates = _CANDIDATES[precision] if own is None else (("static", "f32"), ("dynamic", "f32"))
    wanted = [(s, h) for s, h in candidates if shapes in ("auto", s) and hint in ("auto", h)] or [
        ("static" if shapes == "auto" else shapes, "f32" if hint == "auto" else hint)
    ]
    spec = static_shapes(options.spec, example_inputs, free_sizes)
    engines = {
        f"{s} shapes, {h}": OpenVinoEngine(
            converted,
            shapes=s,
            hint=h,
            static_shapes=[tuple(t.shape) for t in example_inputs],
            own_int8=own is not None,
            mode=mode,
            cache=cache,
            backend="openvino",
            precision=precision,
            threads=options.threads,
            spec=spec,
            rows=[],
            versions=versions(),
        )
        for s, h in wanted
    }
    arrays = tuple(t.numpy() for t in example_inputs)
    with torch.inference_mode():
        best, rows = fastest(engines, arrays)
    for name, engine in engines.items():
        if name != best:
            engine.close()
    kept = engines[best]
    rows.append(
        choice(
            f"{mode.upper()} hint, INFERENCE_NUM_THREADS={options.threads}, share_inputs, "
            "share_outputs",
            True,
            None,
            f"nncf.quantize, TRANSFORMER, {len(options.calibration) or 1} calibration batches"
            if options.precision == "int8"
            else "as OpenVINO advises for one request at a time"
            if mode == "latency"
            else "a stream a thread: calls from several threads run beside each other",
        )
    )
    if cache:
        rows.append(choice("model cache", True, None, "of this CPU and OpenVINO version alone"))
    if own is not None:
        why = "int8 of fastrec.quantize_, rounded as its kernels round"
        if not exact:
            why = "int8 of fastrec.quantize_, rounded as OpenVINO does: more turned integers"
        if int8_properties():
            why += (
                "; no VNNI here, where OpenVINO's int8 saturates: its integers in float32 products"
            )
        rows.append(choice("int8 as QDQ", True, None, why))
    kept._rows = rows
    return kept


def _convert(
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    free_sizes: str,
    exact: bool = True,
) -> Any:
    """ov.Model of a torch model, its batch free, and all other sizes as in the example or free."""
    ov = _openvino()
    import torch

    from fastrec.exporters.model_spec import quantised_module
    from fastrec.exporters.onnx.export import write_onnx
    from fastrec.exporters.onnx.forms import needs_forms
    from fastrec.exporters.trace import evaluated, first_line, quiet

    if free_sizes == "all" or quantised_module(model) is not None or needs_forms(model):
        # The frontend for torch knows none of fastrec's ops; the ONNX export spells them out.
        with tempfile.TemporaryDirectory(prefix="fastrec-openvino-") as folder:
            file = Path(folder) / "model.onnx"
            write_onnx(model, file, example_inputs, free=("B",) if free_sizes == "batch" else None)
            # convert_model would first fuse scales, and with them roundings, into FakeQuantize.
            converted = ov.Core().read_model(file)
            if exact:
                round_before_quantising(converted)
            return converted
    if len(example_inputs[0]) == 1:
        example_inputs = tuple(torch.cat((t, t)) for t in example_inputs)
    shapes = [ov.PartialShape([-1, *t.shape[1:]]) for t in example_inputs]
    with quiet(), torch.inference_mode():
        try:
            converted = ov.convert_model(
                evaluated(model), example_input=example_inputs, input=shapes
            )
        except (RuntimeError, TypeError) as error:
            raise BackendError(f"OpenVINO cannot convert the model: {first_line(error)}") from error
    return converted


def _quantise(model: Any, calibration: list[tuple[np.ndarray, ...]]) -> Any:
    """nncf.quantize for transformers on the calibration batches."""
    try:
        import nncf
    except ImportError as error:
        raise MissingDependencyError("nncf", "openvino", "OpenVINO int8") from error
    from fastrec.exporters.trace import quiet

    nncf.set_log_level(logging.ERROR)
    # Its progress bars go to stdout, which belongs to the program that called.
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        return nncf.quantize(
            model,
            nncf.Dataset(calibration, lambda request: dict(enumerate(request))),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
        )


def load(path: Path, header: dict[str, Any], threads: int | None) -> Engine:
    """Open a checked artifact; imports no torch."""
    if (reason := can_run()) is not None:
        raise BackendError(f"openvino: {reason}")
    settings = header["settings"]
    return OpenVinoEngine(
        _openvino().Core().read_model(path / _MODEL),
        shapes=settings["shapes"],
        hint=settings["hint"],
        static_shapes=settings["static_shapes"],
        own_int8=settings.get("own_int8", False),
        mode=settings.get("mode", "latency"),
        cache=settings.get("cache", False),
        backend="openvino",
        precision=header["precision"],
        threads=threads or header["threads"],
        spec=InputSpec.from_dict(header["spec"]),
        rows=header["rows"],
        versions=versions(),
    )
