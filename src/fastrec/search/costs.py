"""Time and bytes of every choice of every layer, measured on this machine in whole plans."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastrec.compress.artifact import artifact_bytes, save
from fastrec.compress.codec import encode
from fastrec.compress.quantization import Int8
from fastrec.measure.timing import interleaved
from fastrec.runtime.compiler import compile
from fastrec.runtime.native.engine import PlanEngine
from fastrec.search.space import Choice, Chosen, Unit, pruned_, quantised_, restructured

PROFILED_CALLS = 60
ROUNDS, CALLS = 40, 20  # of a whole model's latency; a neighbour disturbs some of them
_NATIVE: dict[str, Any] = {"backend": "native", "fallback": "error"}


@dataclass(frozen=True)
class Setting:
    """Conditions of a latency: the inputs of one call, threads and INT8 calibration."""

    inputs: tuple[np.ndarray, ...]
    threads: int
    calibration: Sequence[Any]
    int8: Int8 = field(default_factory=Int8)


@dataclass(frozen=True)
class Measured:
    """A whole model, end to end: the median call of the quietest round in milliseconds, and the
    artifact's bytes / 10^6."""

    latency_ms: float
    size_mb: float


@dataclass(frozen=True)
class Variant:
    """One whole model in which every layer has a choice, and what was measured on it.

    Attributes:
        chosen: layer -> name of its choice.
        us: layer -> microseconds of its steps; "" holds the steps outside all layers.
            Empty where nothing was timed.
        size: layer -> bytes in the artifact's tensor file; "" likewise.
        steps: the profile's rows with multiply-adds: op, macs, density, bytes, us.
        call_us: a whole call; None where it was not timed.
    """

    chosen: dict[str, str]
    us: dict[str, float]
    size: dict[str, int]
    steps: list[dict[str, Any]] = field(default_factory=list)
    call_us: float | None = None


@dataclass
class CostTable:
    """Layer and choice -> microseconds and bytes, from variants in which every layer had one.

    ``base`` is the model as it is, end to end.
    """

    units: Sequence[Unit]
    variants: Sequence[Variant]
    base: Measured
    us: dict[tuple[str, str], float] = field(init=False, default_factory=dict)
    size: dict[tuple[str, str], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for variant in self.variants:
            for unit in self.units:
                key = (unit.name, variant.chosen[unit.name])
                if variant.us:
                    self.us[key] = min(variant.us.get(unit.name, 0.0), self.us.get(key, np.inf))
                self.size[key] = variant.size.get(unit.name, 0)
        first = self.variants[0]
        # A call's own overhead, the manifest, and what belongs to no layer.
        self._overhead_us = max(0.0, self.base.latency_ms * 1e3 - sum(first.us.values()))
        layers = sum(self.size[u.name, u.choices[0].name] for u in self.units)
        self._rest_bytes = self.base.size_mb * 1e6 - layers
        self._rest_us = {"fp32": first.us.get("", 0.0)}
        # Norms round otherwise beside INT8.
        mixed = [v.us.get("", 0.0) for v in self.variants if any("int8" in c for c in
                 v.chosen.values()) and v.us]  # fmt: skip
        self._rest_us["int8"] = min(mixed, default=self._rest_us["fp32"])

    def cost(self, unit: Unit, choice: Choice) -> tuple[float, float]:
        """(microseconds, bytes) of one layer."""
        timed = dataclasses.replace(choice, sparsity=0.0) if _untimed(choice) else choice
        return self.us[unit.name, timed.name], self.size[unit.name, choice.name]

    def predict(self, chosen: Chosen) -> Measured:
        """The whole model: the sum of its layers', and what is beside them."""
        costs = [self.cost(unit, chosen[unit.name]) for unit in self.units]
        kind = "int8" if any(c.precision == "int8" for c in chosen.values()) else "fp32"
        us = self._overhead_us + self._rest_us[kind] + sum(c[0] for c in costs)
        size = self._rest_bytes + sum(c[1] for c in costs)
        return Measured(us / 1e3, size / 1e6)


def variants_of(units: Sequence[Unit]) -> list[dict[str, Choice]]:
    """Whole models that between them show every choice of every layer; the first is as it is.

    Each variant gives one and the same choice to all layers that have it.
    """
    attention = [u for u in units if u.kind == "attention"]
    distinct = list(dict.fromkeys(c for u in units if u not in attention for c in u.choices))
    most = max((len(u.choices) for u in attention), default=1)
    timed = [c for c in distinct if not _untimed(c)]
    timed += [Choice()] * (most - len(timed))
    found = []
    for number, choice in enumerate([*timed, *filter(_untimed, distinct)]):
        chosen = {}
        for unit in units:
            fitting = (choice, Choice(precision=choice.precision))
            if unit in attention:
                cycle = 0 if _untimed(choice) else number % len(unit.choices)
                chosen[unit.name] = unit.choices[cycle]
            else:
                chosen[unit.name] = next((c for c in fitting if c in unit.choices), unit.choices[0])
        found.append(chosen)
    return found


def _untimed(choice: Choice) -> bool:
    """Pruned float layers run as they are: float kernels skip nothing."""
    return choice.precision == "fp32" and choice.sparsity > 0


def measure_variant(
    model: nn.Module, units: Sequence[Unit], chosen: Chosen, setting: Setting
) -> Variant:
    """Make, compile and profile one variant, untrained: times do not depend on the weights.

    Raises:
        BackendError: the model does not lower to one plan; names what is lacking.
    """
    made = carried_out(model, chosen, setting)
    names = {name: choice.name for name, choice in chosen.items()}
    size = _bytes_by_layer(made, [u.name for u in units])
    if any(_untimed(choice) for choice in chosen.values()):
        return Variant(names, {}, size)
    engine = compile(made, setting.inputs, threads=setting.threads, **_NATIVE)
    assert isinstance(engine, PlanEngine)
    rows = engine.profile(setting.inputs, calls=PROFILED_CALLS)
    us: dict[str, float] = {}
    behind = _behind(model, [u.name for u in units])
    for row in rows:
        # Layers of one input are one product: each has its share by its bytes.
        owners = [
            behind.get(name) or _owner(name, [u.name for u in units])
            for name in row["module"].split(", ")
        ]
        whole = sum(size.get(owner, 1) for owner in owners)
        for owner in owners:
            us[owner] = us.get(owner, 0.0) + row["us"] * size.get(owner, 1) / whole
    kept = ("module", "op", "macs", "density", "bytes", "read_bytes", "written_bytes", "us")
    steps = [{k: row[k] for k in kept} for row in rows if row["macs"]]
    call_us = _call_ms(engine, setting) * 1e3
    engine.close()
    return Variant(names, us, size, steps, call_us)


def carried_out(
    model: nn.Module, chosen: Chosen, setting: Setting, train: Callable[..., Any] | None = None
) -> nn.Module:
    """A copy of ``model`` with the choices carried out."""
    made = restructured(model, chosen)
    pruned_(made, chosen, train)
    made.eval()
    quantised_(made, chosen, setting.calibration, setting.int8)
    return made


def measure(model: nn.Module, setting: Setting) -> Measured:
    """A whole model, compiled and saved.

    Raises:
        BackendError: the model does not lower to one plan, or its answers differ from torch's.
    """
    engine = compile(model, setting.inputs, threads=setting.threads, **_NATIVE)
    latency_ms = _call_ms(engine, setting)
    engine.close()
    with tempfile.TemporaryDirectory() as folder:
        size = artifact_bytes(save(model, Path(folder) / "model"))
    return Measured(latency_ms, size / 1e6)


def _call_ms(engine: Any, setting: Setting) -> float:
    taken = interleaved({"it": engine}, [setting.inputs], rounds=ROUNDS, calls=CALLS, warm_s=0.005)
    return taken["it"].best_round_ms


def _owner(module: str, names: Iterable[str]) -> str:
    """The innermost named layer that a step's module is or lies in; "" for none."""
    inside = [n for n in names if module == n or module.startswith(f"{n}.")]
    return max(inside, key=len, default="")


def _behind(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Activation in an nn.Sequential -> the named layer before it, whose cost it is: some kernels
    take it in, others leave it a step of its own (GELU behind a grouped layer: ten times as
    long as the layer)."""
    found: dict[str, str] = {}
    for parent, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        last = ""
        for key, child in module.named_children():
            name = f"{parent}.{key}".lstrip(".")
            if name in names:
                last = name
            elif any(True for _ in child.parameters()):
                last = ""
            elif last:
                found[name] = last
    return found


def _bytes_by_layer(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Bytes of the stored tensors and of their entries in both files, by the layer that they
    belong to."""
    stored, entries = encode(model.state_dict())
    size: dict[str, int] = {}
    for name, entry in entries.items():
        owner = _owner(name, names)
        size[owner] = size.get(owner, 0) + len(json.dumps({name: entry}, indent=1))
    for name, tensor in stored.items():
        owner = _owner(name.partition("#")[0], names)
        header = len(json.dumps({name: {"dtype": "F32", "shape": [9], "data_offsets": [9, 99]}}))
        size[owner] = size.get(owner, 0) + tensor.numel() * tensor.element_size() + header
    return size


def by_name(units: Sequence[Unit], names: Mapping[str, str]) -> dict[str, Choice]:
    """Choices from their names."""
    return {u.name: next(c for c in u.choices if c.name == names[u.name]) for u in units}
