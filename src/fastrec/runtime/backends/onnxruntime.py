"""ONNX Runtime: fp32, and int8 by its own dynamic quantiser; on the CPU or another provider.

Measured on the canonical ranker: per-channel QInt8 weights of all supported operators, without
reduce_range, are the fastest; static QDQ (u8 or s8 activations) is 8 to 20 % slower, so it is not
offered. Pre-processing the graph and other spinning settings change nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrec.errors import ArgumentError, BackendError, not_installed
from fastrec.exporters.onnx.session import (
    PROVIDERS,
    SessionSettings,
    nodes_by_provider,
    open_session,
    provider_reason,
)
from fastrec.measure.choice import choice
from fastrec.measure.machine import int8_products_saturate
from fastrec.measure.packages import missing, package_versions
from fastrec.runtime import artifact
from fastrec.runtime.engine import BuildOptions, Engine, closed_loop
from fastrec.spec import InputSpec

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "int8")
_MODEL = "model.onnx"
# Two: memory patterns are laid out in the first, used from the second.
_WARM_CALLS = 2


def can_run() -> str | None:
    """None, or why not."""
    if missing("onnxruntime"):
        return not_installed("onnxruntime", "onnx")
    return None


def versions() -> dict[str, str]:
    """Versions of the packages that a build uses."""
    return package_versions("onnxruntime", "onnx", "onnxscript", "torch")


class OnnxRuntimeEngine(Engine):
    """A session fed with plain numpy arrays, or through an IO binding."""

    def __init__(
        self,
        file: Path,
        scratch: Path | None,
        *,
        settings: SessionSettings | None = None,
        warm_shapes: Sequence[Sequence[int]] = (),
        **about: Any,
    ) -> None:
        super().__init__(**about)
        self._file = file
        self._settings = settings or SessionSettings()
        artifact.keeps(self, scratch)
        # Its workers spin for 40 ms after a run, measured.
        self.spin_s = 0.05 if self._settings.spinning else 0.0
        self._session = open_session(file, threads=self.threads, settings=self._settings)
        self._single: Any = None
        self._output = self._session.get_outputs()[0].name
        self._warm_shapes = [list(shape) for shape in warm_shapes]
        self._warm_up()

    def _warm_up(self) -> None:
        """Calls that let the session lay out its memory, and a provider compile what it put off."""
        if not self._warm_shapes:
            return
        zeros = [
            np.zeros(shape, f.dtype)
            for shape, f in zip(self._warm_shapes, self.spec.fields, strict=True)
        ]
        for _ in range(_WARM_CALLS):
            self._run(zeros)

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        if self._settings.io_binding:
            return self._run_bound(arrays)
        scores: np.ndarray = self._session.run(
            None, dict(zip(self.spec.names, arrays, strict=True))
        )[0]
        return scores

    def _run_bound(self, arrays: list[np.ndarray]) -> np.ndarray:
        """A binding a call: calls may come from several threads."""
        binding = self._session.io_binding()
        for name, array in zip(self.spec.names, arrays, strict=True):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output(self._output, "cpu")
        self._session.run_with_iobinding(binding)
        scores: np.ndarray = binding.copy_outputs_to_cpu()[0]
        return scores

    def throughput(
        self, requests: Sequence[tuple[np.ndarray, ...]], *, seconds: float = 2.0
    ) -> float:
        """The better of one call on all threads at a time, and one single-threaded call each."""
        together = super().throughput(requests, seconds=seconds)
        if self.threads == 1 or self._settings.provider != "cpu":
            return together
        if self._single is None:
            self._single = open_session(self._file, threads=1, settings=self._settings)
        names = self.spec.names

        def call(*inputs: np.ndarray) -> None:
            self._single.run(None, dict(zip(names, inputs, strict=True)))

        return max(together, closed_loop(call, requests, self.threads, seconds))

    def save(self, path: str | Path) -> Path:
        """Write the ONNX model with its header; see :func:`fastrec.runtime.load_engine`."""
        header = self._header()
        header["settings"] = {
            "session": self._settings.to_dict(),
            "warm_shapes": self._warm_shapes,
        }
        return artifact.write(path, header, lambda folder: _copy(self._file, folder / _MODEL))

    def close(self) -> None:
        """Free the session."""
        super().close()
        self._session = self._single = None


def _copy(source: Path, target: Path) -> None:
    from fastrec.exporters.onnx.storage import external_data

    shutil.copyfile(source, target)
    if external_data(source).exists():
        shutil.copyfile(external_data(source), external_data(target))


def session_settings(options: BuildOptions) -> SessionSettings:
    """The session's settings out of a build's.

    Raises:
        ArgumentError: an unknown provider, or a wrong value.
    """
    given = options.settings
    provider = options.setting("provider", tuple(PROVIDERS), "cpu")
    extra = given.get("provider_options", {})
    if not isinstance(extra, Mapping) or any(not isinstance(k, str) for k in extra):
        raise ArgumentError("settings['provider_options']", "a dict with names as keys", extra)
    inter_op = given.get("inter_op", 1)
    if type(inter_op) is not int or inter_op < 1:
        raise ArgumentError("settings['inter_op']", "a positive integer", inter_op)
    switches = ("on", "off")
    # Measured on the CPU: nothing to gain (1.02 to 1.17 of the time without).
    binding = "off" if provider == "cpu" else "on"
    return SessionSettings(
        provider,
        {name: str(value) for name, value in extra.items()},
        spinning=options.setting("spinning", switches, "on") == "on",
        inter_op=inter_op,
        io_binding=options.setting("io_binding", switches, binding) == "on",
        cpu_nodes=options.setting("cpu_nodes", ("allow", "refuse"), "allow") == "allow",
        custom_ops=options.setting("custom_ops", switches, "off") == "on",
    )


def build(
    model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """Export to ONNX, quantise if asked, open a session.

    Settings: ``free_sizes`` ("batch", or "all": history and candidates stay free too), and those of
    :class:`SessionSettings`: ``provider``, ``provider_options``, ``inter_op``, ``spinning`` and
    ``io_binding`` and ``custom_ops`` ("on", "off"), ``cpu_nodes`` ("allow", "refuse").
    """
    options.allow(
        "free_sizes",
        "provider",
        "provider_options",
        "spinning",
        "inter_op",
        "io_binding",
        "cpu_nodes",
        "custom_ops",
    )
    session = session_settings(options)
    if (reason := provider_reason(session.provider)) is not None:
        raise BackendError(f"provider {session.provider!r}: {reason}")
    if options.precision == "int8" and session.provider != "cpu":
        raise BackendError(
            "onnxruntime: its dynamic quantiser is for the CPU provider; quantise with "
            "fastrec.quantize_ and leave precision at None"
        )
    with artifact.building("onnxruntime") as scratch:
        return _build_in(scratch, model, example_inputs, options, session)


def _build_in(
    scratch: Path,
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    options: BuildOptions,
    session: SessionSettings,
) -> Engine:
    """Build with ``scratch`` for the files, which becomes the engine's."""
    from fastrec.exporters.model_spec import precision_of
    from fastrec.exporters.onnx.export import static_shapes, write_onnx
    from fastrec.exporters.trace import quiet

    precision, own = precision_of(model, options.precision, "onnxruntime")
    file = scratch / _MODEL
    free_sizes = options.setting("free_sizes", ("batch", "all"), "batch")
    write_onnx(
        model,
        file,
        example_inputs,
        free=("B",) if free_sizes == "batch" else None,
        custom_ops=session.custom_ops,
    )
    why = "fp32, every graph optimisation"
    if own is not None:
        why = "int8 of fastrec.quantize_ as QDQ, its own scales"
        if session.custom_ops:
            why = "int8 of fastrec.quantize_ on fastrec's kernels, as custom ops"
    if options.precision == "int8":
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        from fastrec.exporters.onnx.sharing import unshare_int8

        quantised = file.with_name("int8.onnx")
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it logs advice about pre-processing to the root logger
        try:
            with quiet():
                quantize_dynamic(file, quantised, weight_type=QuantType.QInt8, per_channel=True)
                proto = onnx.load(quantised)
                unshare_int8(proto)
                onnx.save(proto, quantised)
        finally:
            root.setLevel(level)
        file.unlink()
        file = quantised
        why = "dynamic, per-channel QInt8 weights: measured faster than static QDQ"
    if precision == "int8" and int8_products_saturate():
        why += "; no VNNI here, so weights as uint8 (session.x64quantprecision), exact but slower"
    engine = OnnxRuntimeEngine(
        file,
        scratch,
        settings=session,
        warm_shapes=[tuple(t.shape) for t in example_inputs],
        backend="onnxruntime",
        precision=precision,
        threads=options.threads,
        spec=static_shapes(options.spec, example_inputs, free_sizes),
        rows=[],
        versions=versions(),
    )
    engine._rows = _rows(engine, why)
    return engine


def _rows(engine: OnnxRuntimeEngine, why: str) -> list[dict[str, Any]]:
    """The session's settings, and the providers that run its nodes."""
    session, idle = engine._settings, "spin" if engine._settings.spinning else "sleep"
    threads = f"intra_op_num_threads={engine.threads}, inter_op {session.inter_op}"
    rows = [choice(f"{threads}, ORT_ENABLE_ALL, idle workers {idle}", True, None, why)]
    if session.provider != "cpu":
        name, _, _ = PROVIDERS[session.provider]
        counts = nodes_by_provider(engine._session)
        others = {n: count for n, count in counts.items() if n != name}
        said = f"it runs {counts.get(name, 0)} nodes" if counts else "as asked"
        if others:
            said += "; not supported there: " + ", ".join(f"{n} {c}" for n, c in others.items())
        rows.append(choice(name, True, None, said))
    binding = "inputs and output in the session's memory" if session.io_binding else "numpy arrays"
    rows.append(choice("IO binding", session.io_binding, None, binding))
    return rows


def load(path: Path, header: dict[str, Any], threads: int | None) -> Engine:
    """Open a checked artifact; imports no torch."""
    if (reason := can_run()) is not None:
        raise BackendError(f"onnxruntime: {reason}")
    settings = header.get("settings", {})
    return OnnxRuntimeEngine(
        path / _MODEL,
        None,
        settings=SessionSettings.from_dict(settings.get("session", {})),
        warm_shapes=settings.get("warm_shapes", ()),
        backend="onnxruntime",
        precision=header["precision"],
        threads=threads or header["threads"],
        spec=InputSpec.from_dict(header["spec"]),
        rows=header["rows"],
        versions=versions(),
    )
