"""pytest-benchmark over the registry: ``pytest bench/bench_ops.py``.

Host latency of each op's public function on its bench samples, backend by backend; forward and
backward of the differentiable ones; and, in the group "overhead", what a call costs on an op's
smallest input, beside torch's own smallest op. ``bench_kernels.py`` holds the rivals and the goals.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rivals
from fastrec import kernels
from fastrec.kernels._registry import OpSpec, Sample

SPECS = kernels.registry()
CASES = [
    pytest.param(spec, backend, sample, id=f"{op_id}-{backend}-{sample.name}")
    for op_id, spec in SPECS.items()
    for backend in spec.backends.can_run
    for sample in spec.samples()
    if sample.bench
]
TRAINED = [
    pytest.param(spec, sample, id=f"{op_id}-{sample.name}")
    for op_id, spec in SPECS.items()
    for sample in spec.samples()
    if sample.bench and "training" in rivals.modes(op_id, sample)
]
# A reference may take a second on the largest samples.
ROUNDS, REFERENCE_ROUNDS = 200, 5


def _describe(benchmark: Any, spec: OpSpec, sample: Sample, backend: str, group: str) -> None:
    benchmark.group = group
    benchmark.extra_info |= {
        "op": spec.op_id,
        "backend": backend,
        "isa": spec.kernel_isa() if backend == "cpu" else None,
        "threads": kernels.num_threads(),
        "macs": sample.macs,
        "bytes": sample.bytes_moved,
        **sample.labels,
    }


@pytest.mark.parametrize(("spec", "backend", "sample"), CASES)
def bench_forward(benchmark: Any, spec: OpSpec, backend: str, sample: Sample) -> None:
    args, kwargs = sample.make()
    # Correct first: a wrong kernel is never timed.
    spec.compare(spec.function(*args, **kwargs, backend=backend), args, kwargs)
    _describe(benchmark, spec, sample, backend, sample.name)
    benchmark.pedantic(
        spec.function,
        args=args,
        kwargs=kwargs | {"backend": backend},
        rounds=ROUNDS if backend == "cpu" else REFERENCE_ROUNDS,
        warmup_rounds=3,
    )


@pytest.mark.parametrize(("spec", "sample"), TRAINED)
def bench_forward_backward(benchmark: Any, spec: OpSpec, sample: Sample) -> None:
    from gate import why_wrong

    args, kwargs = sample.make()
    calls = rivals.load(spec.op_id).training(args, kwargs, kernels.num_threads())
    ours = calls.pop("fastrec")
    half = any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args)
    # torch's own autograd, where its answer is affordable.
    expected = next(iter(calls.values()), ours)()
    wrong = why_wrong(ours, expected, lambda x: x, "fastrec", "bf16" if half else "fp32")[1]
    assert wrong is None, wrong
    _describe(benchmark, spec, sample, "cpu", f"{sample.name} forward + backward")
    benchmark.pedantic(ours, rounds=ROUNDS // 4, warmup_rounds=3)


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def bench_overhead(benchmark: Any, spec: OpSpec) -> None:
    sample = min((s for s in spec.samples() if s.macs), key=lambda s: (s.macs, s.bytes_moved))
    args, kwargs = sample.make()
    _describe(benchmark, spec, sample, "cpu", "overhead")
    with torch.no_grad():
        benchmark.pedantic(
            spec.function, args=args, kwargs=kwargs, rounds=ROUNDS, iterations=20, warmup_rounds=3
        )


@pytest.mark.parametrize("op", [torch.relu, torch.ops.aten.relu.default], ids=["relu", "aten relu"])
def bench_overhead_of_torch(benchmark: Any, op: Any) -> None:
    benchmark.group = "overhead"
    with torch.no_grad():
        benchmark.pedantic(
            op, args=(torch.zeros(16),), rounds=ROUNDS, iterations=20, warmup_rounds=3
        )
