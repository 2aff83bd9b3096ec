"""``make gpu-report``: tests and timings of the GPU kernels and the whole ranker, with rivals.

Device time: CUDA events around replays of a graph that holds one call a set of inputs, as many
sets as overflow the L2 cache. Host latency: wall clock of a call, apart. Ceilings are measured in
the same run. Every part has a share of the time budget and is guarded: what fails or finds no time
leaves a row with its reason, and the report is written after each part, so that a run that is cut
off leaves what it has. Without a GPU: the tests of results, interpreted, and empty cells beside the
bounds that data sheets allow. It has never been run on a GPU by its authors.

Needs torch, triton and pytest alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
BATCHES = (1, 8, 64)
L2_BYTES = 128 << 20
MOST_SETS = 64

Row = dict[str, Any]


class Report:
    """Rows so far, the time left, and the files."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self.data: dict[str, Any] = {"rows": []}

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def add(self, what: str, engine: str, measure: Callable[[], Row]) -> None:
        """A row of what ``measure`` returns, or of the reason why it could not."""
        row: Row = {"what": what, "engine": engine}
        if self.left() < 10:
            row["why"] = "no time was left"
        else:
            try:
                row |= measure()
            except Exception as error:  # a rival that is missing must not end the report
                lines = [line for line in str(error).splitlines() if line.strip()]
                row["why"] = f"{type(error).__name__}: {lines[0] if lines else ''}"
        self.data["rows"].append(row)

    def write(self) -> None:
        """gpu_report.json and gpu_report.md, whole at any time."""
        for name, text in (
            ("gpu_report.json", json.dumps(self.data, indent=2) + "\n"),
            ("gpu_report.md", self.markdown()),
        ):
            draft = self.out / f".{name}"
            draft.write_text(text)
            draft.replace(self.out / name)

    def markdown(self) -> str:
        """The report for people."""
        data = self.data
        lines = [f"# {data['gpu'] or 'No GPU: no figure was measured'}", ""]
        lines += [f"{name}: {summary}" for name, summary in data.get("tests", {}).items()]
        lines += [f"ceiling, {name}: {value}" for name, value in data.get("ceilings", {}).items()]
        lines += [
            "",
            "| what | engine | device us | host us | GB/s | Gop/s | H200 bound us | note |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|")
        for row in data["rows"]:
            cells = [row["what"], row["engine"]]
            keys = ("device_us", "host_us", "gb_per_s", "gop_per_s", "h200_bound_us")
            cells += ["" if row.get(key) is None else f"{row[key]:.4g}" for key in keys]
            lines.append(f"| {' | '.join([*cells, row.get('why', '')])} |")
        return "\n".join(lines) + "\n"


def device_us(calls: list[Callable[[], Any]], replays: int = 20) -> float:
    """Median device time of a call, in us: a graph of all calls, replayed between events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return replayed_us(graph, len(calls), replays)


def replayed_us(graph: Any, calls: int, replays: int = 20) -> float:
    """Median over replays of a graph, in us a call."""
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / calls)
    return statistics.median(times)


def host_us(call: Callable[[], Any], calls: int = 100) -> float:
    """Median wall clock of a call and a synchronisation, in us."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def rates(us: float, moved: int, macs: int) -> Row:
    """A measured time and what it achieves of bytes and operations (2 a multiply-add)."""
    return {"device_us": us, "gb_per_s": moved / us / 1e3, "gop_per_s": 2 * macs / us / 1e3}


def ceilings() -> dict[str, str]:
    """What this GPU reaches on a copy and on large products."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = device_us([lambda: target.copy_(source)])
    found = {"copy": f"{2 * source.numel() / us / 1e3:.0f} GB/s"}
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    us = device_us([lambda: a @ a])
    found["bf16 product of 8192"] = f"{2 * 8192**3 / us / 1e6:.0f} Top/s"
    b = torch.randint(-9, 9, (8192, 8192), device="cuda", dtype=torch.int8)
    us = device_us([lambda: torch._int_mm(b, b.t())])
    return found | {"int8 product of 8192": f"{2 * 8192**3 / us / 1e6:.0f} Top/s"}


def run_tests(report: Report, gpu: bool) -> None:
    """The tests of the GPU kernels: on the GPU, or the ranker's interpreted where there is none."""
    folder = ROOT / "tests" / "kernels" / "gpu"
    files = sorted(folder.glob("test_*_triton.py")) + sorted(folder.glob("test_*_cuda.py"))
    if not gpu:
        files = [folder / "test_ranker_triton.py", "-k", "precision or int8_to or refused"]
    env = os.environ if gpu else os.environ | {"TRITON_INTERPRET": "1"}
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
        limit = max(min(report.left() / 2, 240), 1)
        run = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=limit
        )
        summary = (run.stdout.splitlines() or run.stderr.splitlines() or ["none ran"])[-1]
        report.data["tests_status"] = run.returncode
    except subprocess.TimeoutExpired:
        summary, report.data["tests_status"] = "cut off: their share of the time was over", None
    report.data["tests"] = {"tests" if gpu else "tests, interpreted": summary}


def sets_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Copies of an op's inputs on the GPU, enough to overflow the L2 cache."""

    def there(value: Any) -> Any:
        return value.cuda().clone() if isinstance(value, torch.Tensor) else value

    size = sum(a.nbytes for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    for _ in range(min(MOST_SETS, L2_BYTES // max(size, 1) + 1)):
        yield tuple(map(there, args)), {k: there(v) for k, v in kwargs.items()}


def op_rows(report: Report) -> None:
    """Every op with a GPU backend on its bench samples, beside torch's reference."""
    from fastrec import kernels

    for op_id, spec in kernels.registry().items():
        for backend in [b for b in ("cuda", "triton") if b in spec.backends.can_run]:
            for sample in [s for s in spec.samples() if s.bench]:

                def ours(spec: Any = spec, sample: Any = sample, backend: str = backend) -> Row:
                    args, kwargs = sample.make()
                    sets = list(sets_of(args, kwargs))
                    out = spec.function(*sets[0][0], **sets[0][1], backend=backend)
                    out = out.cpu() if isinstance(out, torch.Tensor) else out
                    spec.compare(out, args, kwargs)  # right first, then fast
                    calls = [
                        lambda a=a, k=k: spec.function(*a, **k, backend=backend) for a, k in sets
                    ]
                    us = device_us(calls)
                    row = rates(us, sample.bytes_moved, sample.macs)
                    return row | {"host_us": host_us(calls[0])}

                def torchs(spec: Any = spec, sample: Any = sample) -> Row:
                    sets = list(sets_of(*sample.make()))
                    calls = [lambda a=a, k=k: spec.reference(*a, **k) for a, k in sets]
                    return rates(device_us(calls), sample.bytes_moved, sample.macs)

                report.add(f"{op_id} {sample.name}", backend, ours)
                report.add(f"{op_id} {sample.name}", "torch reference", torchs)
        report.write()


def attention_rivals(report: Report) -> None:
    """SDPA and FlexAttention at the goal's long shape."""
    shape = (8, 8, 8192, 64)
    what = "attention [8, 8, 8192, 64] bf16"
    makers = {
        "SDPA, dense": lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q),
        "FlexAttention, window 64 + log2": flex,
    }
    for name, attend in makers.items():

        def measure(attend: Any = attend) -> Row:
            q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            return {"device_us": device_us([lambda: attend(q)], replays=5)}

        report.add(what, name, measure)


_FLEX: dict[str, Any] = {}


def flex(q: torch.Tensor) -> torch.Tensor:
    """FlexAttention, compiled, with the mask of a window of 64 and power-of-two distances."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not _FLEX:

        def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
            distance = (i - j).abs()
            return (distance <= 64) | ((distance & (distance - 1)) == 0)

        length = q.shape[2]
        _FLEX["mask"] = create_block_mask(mask, None, None, length, length, device="cuda")
        _FLEX["call"] = torch.compile(flex_attention)
    return _FLEX["call"](q, q, q, block_mask=_FLEX["mask"])


def product_rivals(report: Report) -> None:
    """cuBLASLt INT8, cuSPARSELt 2:4 and batched products at the goals' shapes."""
    for m, k in ((3200, 1024), (4096, 4096)):
        macs, moved = m * k * k, 2 * m * k + k * k

        def int_mm(m: int = m, k: int = k, macs: int = macs, moved: int = moved) -> Row:
            x = torch.randint(-9, 9, (m, k), device="cuda", dtype=torch.int8)
            w = torch.randint(-9, 9, (k, k), device="cuda", dtype=torch.int8)
            return rates(device_us([lambda: torch._int_mm(x, w.t())]), moved, macs)

        def two_four(m: int = m, k: int = k, macs: int = macs, moved: int = moved) -> Row:
            x = torch.randint(-9, 9, (m, k), device="cuda", dtype=torch.int8)
            w = torch.tensor([0, 0, 1, 1], device="cuda", dtype=torch.int8).tile(k, k // 4)
            packed = torch._cslt_compress(w)
            call = lambda: torch._cslt_sparse_mm(packed, x.t(), out_dtype=torch.int32)  # noqa: E731
            return rates(device_us([call]), moved, macs)

        report.add(f"int8 product M={m} K=N={k}", "torch._int_mm", int_mm)
        report.add(f"int8 product M={m} K=N={k}", "cuSPARSELt 2:4", two_four)

    def bmm() -> Row:
        x = torch.randn(4, 6400, 64, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(4, 64, 64, device="cuda", dtype=torch.bfloat16)
        return rates(device_us([lambda: torch.bmm(x, w)]), 2 * 2 * x.numel(), 6400 * 4 * 64 * 64)

    report.add("grouped product M=6400 4x64x64", "torch.bmm", bmm)


def ranker_rows(report: Report, gpu: bool) -> None:
    """The canonical ranker: ours and rivals; without a GPU, what the data sheet bounds."""
    import fastrec
    from fastrec.models import Ranker, RankerConfig
    from fastrec.runtime.model_spec import spec_of

    torch.manual_seed(0)
    rows = {} if gpu else {"n_items": 2000, "n_categories": 500}  # a bound reads no whole table
    canonical = RankerConfig.taobao()
    model = Ranker(RankerConfig(**{**canonical.to_dict(), **rows})).eval()
    spec = spec_of(model, ())

    def request(batch: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
        arrays = spec.sample({"B": batch, "L": 100, "m": 50}, seed=seed)
        arrays[3][:] = 100
        return tuple(map(torch.from_numpy, arrays))

    for precision in ("bf16", "int8"):
        if precision == "int8":
            try:
                fastrec.quantize_(model, fastrec.Int8(), calibration=[request(8, 1)])
            except ImportError as error:
                report.data["rows"].append(
                    {"what": "ranker int8", "engine": "fastrec cuda", "why": str(error)}
                )
                return
        for batch in BATCHES:
            what = f"ranker {precision} B={batch}"
            wanted = None if precision == "int8" else precision

            def ours(batch: int = batch, wanted: str | None = wanted) -> Row:
                inputs = request(batch)
                found: Row = bound(model, inputs, wanted)
                if not gpu:
                    return found | {"why": "not measured: torch sees no CUDA device"}
                from fastrec.runtime.cuda.launches import Sizes

                engine = fastrec.compile(model, inputs, "cuda", precision=wanted)
                staged = engine._executor.staged(Sizes(batch, 100, 50))
                arrays = [t.numpy() for t in inputs]
                engine(*arrays)
                found |= {"device_us": replayed_us(staged.launches_graph, 1, 200)}
                return found | {"host_us": host_us(lambda: engine(*arrays))}

            report.add(what, "fastrec cuda", ours)
            if not gpu or precision == "int8":
                continue
            there = [t.cuda() for t in request(batch)]
            plain = Ranker(model.config).eval().to("cuda", torch.bfloat16)
            for name, options in (
                ("torch", None),
                ("torch.compile, CUDA graphs", {"mode": "reduce-overhead"}),
                ("torch.compile, max-autotune", {"mode": "max-autotune"}),
            ):

                def torchs(options: Any = options, plain: Any = plain, there: Any = there) -> Row:
                    call = plain if options is None else torch.compile(plain, **options)
                    with torch.inference_mode():
                        for _ in range(3):
                            call(*there)
                        latency = host_us(lambda: call(*there))
                        if options is not None:
                            return {"host_us": latency, "why": "host: it replays its own graph"}
                        return {"device_us": device_us([lambda: call(*there)]), "host_us": latency}

                report.add(what, name, torchs)
            for name in ("ONNX Runtime CUDA", "TensorRT"):
                report.data["rows"].append(
                    {"what": what, "engine": name, "why": "fastrec has no adapter for it yet"}
                )
            report.write()


def bound(model: Any, inputs: tuple[torch.Tensor, ...], precision: str | None) -> Row:
    """The least time that an H200's data sheet allows for the request's launches."""
    from fastrec.runtime.cuda.engine import launch_rows
    from fastrec.runtime.cuda.launches import Bucket, Sizes
    from fastrec.runtime.cuda.match import match
    from fastrec.runtime.cuda.weights import Weights
    from fastrec.runtime.model_spec import spec_of
    from fastrec.runtime.plan.lower import lower
    from fastrec.runtime.plan.passes import simplify

    plan = lower(model, inputs, spec_of(model, inputs))
    simplify(plan)
    stages = match(plan)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = Weights(stages, dtype, torch.device("cpu"))
    bucket = Bucket(stages, weights, Sizes(len(inputs[0]), 100, 50), "ieee", True)
    total = launch_rows(bucket.launches, precision or "tf32")[-1]
    return {"h200_bound_us": total["roofline_us"]["H200"], "launches": total["launches"]}


def cut_off(report: Report) -> None:
    """Ends the process when the time is over, with the report as far as it came."""
    report.data.setdefault("failed", []).append("cut off: the time was over within a part")
    report.write()
    os._exit(1)


def main() -> None:
    """Tests, ceilings, the ranker, its rivals, the ops; whatever the time allows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Folder for the report.")
    parser.add_argument("--seconds", type=float, default=500, help="Time for all of it.")
    parser.add_argument("--no-tests", action="store_true", help="Leave the tests out.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    report = Report(options.out, options.seconds)
    report.data |= {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }
    report.write()
    # One row may hang in a compiler or a kernel: then the report ends with what it has.
    watch = threading.Timer(options.seconds + 15, cut_off, [report])
    watch.daemon = True
    watch.start()
    parts: list[Callable[[], None]] = [lambda: ranker_rows(report, gpu)]
    if not options.no_tests:
        parts.append(lambda: run_tests(report, gpu))
    if gpu:
        parts.insert(0, lambda: report.data.update(ceilings=ceilings()))
        parts += [
            lambda: attention_rivals(report),
            lambda: product_rivals(report),
            lambda: op_rows(report),
        ]
    for part in parts:
        try:
            part()
        except Exception as error:  # the report goes on without this part
            report.data.setdefault("failed", []).append(f"{type(error).__name__}: {error}")
        report.write()
    sys.stderr.write(report.markdown())
    sys.exit(1 if report.data.get("tests_status") or report.data.get("failed") else 0)


if __name__ == "__main__":
    main()
