"""pytest-benchmark over the registry: ``pytest bench/bench_ops.py``.

Host latency of each op's public function on its bench samples, against the reference of the same
process. ``bench_kernels.py`` holds the rivals and the goals.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastrec import kernels
from fastrec.kernels._registry import OpSpec, Sample

CASES = [
    pytest.param(spec, backend, sample, id=f"{op_id}-{backend}-{sample.name}")
    for op_id, spec in kernels.registry().items()
    for backend in spec.backends.can_run
    for sample in spec.samples()
    if sample.bench
]


@pytest.mark.parametrize(("spec", "backend", "sample"), CASES)
def bench_op(benchmark: Any, spec: OpSpec, backend: str, sample: Sample) -> None:
    args, kwargs = sample.make()
    # Correct first: a wrong kernel is never timed.
    spec.compare(spec.function(*args, **kwargs, backend=backend), args, kwargs)
    benchmark.group = sample.name
    benchmark.extra_info |= {
        "op": spec.op_id,
        "backend": backend,
        "isa": spec.kernel_isa() if backend == "cpu" else None,
        "threads": kernels.num_threads(),
        "macs": sample.macs,
        "bytes": sample.bytes_moved,
        **sample.labels,
    }
    rounds = 200 if backend == "cpu" else 5
    benchmark.pedantic(
        spec.function,
        args=args,
        kwargs=kwargs | {"backend": backend},
        rounds=rounds,
        warmup_rounds=3,
    )
