"""Everything about one variant: build, check, time, size, quality. One resumable stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastrec.report import accuracy
from fastrec.report.accuracy import Catalogue
from fastrec.report.engines import Built, EngineBuilder, Spec, attempt, specs_of, third_party_output
from fastrec.report.measuring import (
    best_throughput,
    busy_seconds,
    cores_of_others,
    latency_of,
    native_ratio,
    time_engines,
)
from fastrec.report.memory import files_of
from fastrec.report.settings import Progress, Table1Settings

_ONE_COMPILATION = (
    "another batch size is another compilation, half a minute of the demo: --full has it"
)
_NO_RIVALS = "the demo takes quality and throughput on native and eager torch alone: --full has it"


class VariantRun:
    """Measures one variant; see :meth:`run`."""

    def __init__(
        self,
        variant: str,
        settings: Table1Settings,
        builder: EngineBuilder,
        dataset: Any,
        out: Path,
        progress: Progress,
    ) -> None:
        self.variant, self.settings, self.builder = variant, settings, builder
        self.dataset, self.out, self.progress = dataset, out, progress
        self.specs = specs_of(variant, settings)
        # The demo builds an engine once, at the first batch size, and runs it at all of them;
        # otherwise each size gets an engine whose settings were chosen for it.
        self.builds = settings.batches[:1] if settings.quick else settings.batches
        self.built: dict[tuple[str, int], Built] = {}
        self.others: dict[str, float | None] = {}

    def run(self, catalogue: Catalogue | None) -> dict[str, Any]:
        """JSON types: ``engines`` (name -> what was found), ``ratios``, ``catalogue`` and
        ``others`` (cores that other processes used while engines were timed)."""
        self._build()
        found = {spec.name: self._facts(spec) for spec in self.specs}
        ratios = self._time(found)
        self._throughput(found)
        with third_party_output(self.builder.log):
            self._sizes(found)
        catalogue = self._quality(found, catalogue)
        self.builder.close(list(self.built.values()))
        kept = None if catalogue is None else [catalogue.protocol, catalogue.users]
        return {"engines": found, "ratios": ratios, "catalogue": kept, "others": self.others}

    def _at(self, spec: Spec, batch: int) -> Built:
        """The engine that serves this batch size."""
        return self.built[spec.name, batch if batch in self.builds else self.builds[0]]

    def _sizes_of(self, spec: Spec) -> tuple[int, ...]:
        """The batch sizes that this engine is measured at."""
        first_only = self.settings.quick and spec.engine == "torch_compile"
        return self.settings.batches[:1] if first_only else self.settings.batches

    def _left_to_full(self, spec: Spec) -> bool:
        """Whether the demo only times this engine."""
        return self.settings.quick and spec.engine not in ("native", "torch")

    def _build(self) -> None:
        total = len(self.specs) * len(self.builds)
        for i, spec in enumerate(self.specs):
            for j, batch in enumerate(self.builds):
                stage = f"{self.variant}: building and checking {spec.name}"
                self.progress(stage, i * len(self.builds) + j, total)
                check = (batch,) if len(self.builds) > 1 else self._sizes_of(spec)
                self.built[spec.name, batch] = self.builder.built(spec, batch, check)
        self.progress(f"{self.variant}: engines built", total, total)

    def _facts(self, spec: Spec) -> dict[str, Any]:
        first = self._at(spec, self.builds[0])
        by_batch = {str(b): self._at(spec, b) for b in self.settings.batches}
        return {
            "settings": {b: built.settings() for b, built in by_batch.items()},
            "gate": {b: built.gate for b, built in by_batch.items()},
            "why": {
                b: built.why or (None if int(b) in self._sizes_of(spec) else _ONE_COMPILATION)
                for b, built in by_batch.items()
            },
            "build_s": {str(b): self.built[spec.name, b].build_s for b in self.builds},
            "latency": {},
            "calls": {},
            "throughput": None,
            "throughput_why": first.why,
            "size_mb": None,
            "size_why": first.why,
            "source": None,
            "accuracy": None,
            "accuracy_why": first.why,
        }

    def _time(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        ratios = []
        for i, batch in enumerate(self.settings.batches):
            self.progress(f"{self.variant}: timing, batch {batch}", i, len(self.settings.batches))
            engines = {
                spec.name: self._at(spec, batch)
                for spec in self.specs
                if batch in self._sizes_of(spec)
            }
            before, start = busy_seconds(), time.perf_counter()
            samples = time_engines(
                engines,
                self.builder.requests[batch],
                batch=batch,
                seconds_per_engine=self.settings.seconds_per_engine,
                seed=self.settings.seed,
            )
            spent = time.perf_counter() - start
            self.others[str(batch)] = cores_of_others(before, busy_seconds(), spent)
            for name, taken in samples.items():
                found[name]["latency"][str(batch)] = latency_of(taken)
                found[name]["calls"][str(batch)] = taken.n
            if any(spec.precision == "int8" for spec in self.specs):
                ratios.append(native_ratio(self.variant, batch, samples, engines))
        done = len(self.settings.batches)
        self.progress(f"{self.variant}: timed", done, done)
        return ratios

    def _throughput(self, found: dict[str, Any]) -> None:
        for i, spec in enumerate(self.specs):
            self.progress(f"{self.variant}: throughput", i, len(self.specs))
            if self._left_to_full(spec):
                found[spec.name]["throughput_why"] = _NO_RIVALS
                continue
            # Several engines where each size has its own: the best of all.
            for batch in self.builds:
                built = self.built[spec.name, batch]
                if not built.usable:
                    continue
                sizes: Sequence[int] = (batch,)
                if len(self.builds) == 1 and len(self._sizes_of(spec)) > 1:
                    sizes = self.settings.throughput_batches
                rate, why = self._rate(built, sizes)
                best = found[spec.name]["throughput"]
                if rate is None:
                    found[spec.name]["throughput_why"] = why
                elif best is None or rate["rps"] > best["rps"]:
                    every = {**(best["all"] if best else {}), **rate["all"]}
                    found[spec.name]["throughput"] = {**rate, "all": every}
                else:
                    best["all"].update(rate["all"])
        self.progress(f"{self.variant}: throughput", len(self.specs), len(self.specs))

    def _rate(self, built: Built, sizes: Sequence[int]) -> tuple[dict[str, Any] | None, str | None]:
        sizes = [b for b in sizes if b in self.builder.requests]
        seconds = self.settings.throughput_seconds
        with third_party_output(self.builder.log):
            return best_throughput(built, self.builder.requests, sizes, seconds)

    def _sizes(self, found: dict[str, Any]) -> None:
        for spec in self.specs:
            built = self.built[spec.name, self.builds[0]]
            if built.engine is None:
                continue
            network = self.out / "variants" / spec.network
            folder = self.out / "engines" / f"{self.variant}-{spec.name}"
            result, why = attempt("saving it failed", files_of, built, network, folder)
            facts = found[spec.name]
            facts["size_why"] = why
            if result is not None:
                source, facts["size_mb"] = result
                facts["source"] = str(source.relative_to(self.out))

    def _quality(self, found: dict[str, Any], catalogue: Catalogue | None) -> Catalogue | None:
        """The native engine on everything, the others on candidates for a few users."""
        settings, seed = self.settings, self.settings.seed
        for spec in self.specs:
            sizes = self._sizes_of(spec)
            batch = max(b for b in sizes if b <= accuracy.BATCH or b == sizes[0])
            built = self._at(spec, batch)
            if not built.usable:
                continue
            if self._left_to_full(spec):
                found[spec.name]["accuracy_why"] = _NO_RIVALS
                continue
            native = spec.engine == "native"
            if native and catalogue is None:
                catalogue, why = attempt(
                    "evaluating it failed",
                    accuracy.choose_catalogue,
                    built.engine,
                    self.dataset,
                    settings.catalogue_seconds,
                    seed,
                )
            stage = f"{self.variant}: quality, {spec.name}"
            result, why = attempt(
                "evaluating it failed",
                accuracy.measure,
                built.engine,
                self.dataset,
                users=settings.users if native else settings.rival_users,
                catalogue=catalogue if native else None,
                seed=seed,
                batch_size=accuracy.BATCH if native else batch,
                progress=partial(self.progress, stage),
            )
            found[spec.name]["accuracy"], found[spec.name]["accuracy_why"] = result, why
        return catalogue
