"""Every op against the machine's ceiling and its rivals; writes kernels.json and kernels.md.

``python bench/bench_kernels.py --out DIR``. Rounds are interleaved in one process, a kernel is
checked against its reference before it is timed, and ratios carry 95 % intervals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

import rivals
from fastrec import kernels
from fastrec.runtime.machine import machine_card
from fastrec.runtime.measure import Samples, interleaved, ratio
from machine_ceilings import copy_bandwidth_gbs, vpdpbusd_peak_gops

# Longer than one call of any kernel here needs to be timed well, short enough for many rounds.
ROUNDS, CALLS = 25, 8


def measure(threads: int) -> list[dict[str, Any]]:
    """One row per op and bench sample, ours first, then its rivals."""
    kernels.set_num_threads(threads)
    torch.set_num_threads(threads)
    rows = []
    cases = [
        (spec, sample)
        for spec in kernels.registry().values()
        for sample in spec.samples()
        if sample.bench
    ]
    for spec, sample in track(cases, f"{threads} thread(s)", console=Console(stderr=True)):
        args, kwargs = sample.make()
        spec.compare(spec.function(*args, **kwargs), args, kwargs)
        module = rivals.load(spec.op_id)
        prepare = getattr(module, "prepared", None)
        ours = prepare(args, kwargs) if prepare else _bind(spec.function, args, kwargs)
        spec.compare(ours(), args, kwargs)
        calls = {"fastrec": ours}
        calls |= module.rivals(args, kwargs, threads)
        # ONNX Runtime's workers spin for 40 ms after a call; one thread has none.
        settle = 0.0 if threads == 1 else 0.05
        peak_before = vpdpbusd_peak_gops()
        taken = interleaved(calls, [()], rounds=ROUNDS, calls=CALLS, settle_s=settle)
        peak = max(peak_before, vpdpbusd_peak_gops())
        for name, samples in taken.items():
            rows.append(_row(spec.op_id, sample, threads, name, samples, taken["fastrec"], peak))
    return rows


def _bind(function: Any, args: Any, kwargs: Any) -> Any:
    return lambda: function(*args, **kwargs)


def _row(
    op_id: str,
    sample: Any,
    threads: int,
    engine: str,
    samples: Samples,
    ours: Samples,
    peak_gops: float,
) -> dict[str, Any]:
    seconds = samples.p50_ms / 1e3
    speedup = ratio(samples, ours)
    gops = 2 * sample.macs / seconds / 1e9
    int8 = op_id == "sparse_int8_linear" and engine == "fastrec" and peak_gops > 0
    return {
        "op": op_id,
        "case": sample.name,
        **sample.labels,
        "threads": threads,
        "engine": engine,
        "us": {q: getattr(samples, f"{q}_ms") * 1e3 for q in ("p50", "p95", "p99")},
        "best_round_us": samples.best_round_ms * 1e3,
        "gops_kept": gops,
        "gbs": sample.bytes_moved / seconds / 1e9,
        "peak_share": gops / (peak_gops * threads) if int8 else None,
        "fastrec_is_faster_by": {"x": speedup.value, "ci95": [speedup.low, speedup.high]},
    }


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures this op was built to reach: one thread, M = 50, K = N = 1,024."""
    ours = {
        row["density"]: row
        for row in rows
        if row["op"] == "sparse_int8_linear"
        and row["engine"] == "fastrec"
        and row["threads"] == 1
        and row["rows"] == 50
    }
    dense = ours[1.0]["us"]["p50"]
    result = [
        {
            "goal": f"share of the vpdpbusd peak, density {density:g}",
            "at_least": at_least,
            "measured": ours[density]["peak_share"],
        }
        for density, at_least in ((1.0, 0.85), (0.6, 0.80))
    ]
    gain = {"goal": "density 0.6 against our own dense", "at_least": 1.5}
    return [*result, gain | {"measured": dense / ours[0.6]["us"]["p50"]}]


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    ceilings = report["ceilings"]
    lines = [
        "# Kernels",
        "",
        f"{report['machine']['cpu']}, {report['machine']['cores_usable']} cores; "
        f"vpdpbusd peak {ceilings['vpdpbusd_peak_gops']:.0f} GOPS a core, copy "
        f"{ceilings['copy_gbs']:.0f} GB/s. Medians of {ROUNDS} interleaved rounds of {CALLS} "
        "calls; GOPS count kept multiply-adds twice.",
        "",
        "| goal | at least | measured |",
        "|---|---|---|",
        *(
            f"| {row['goal']} | {row['at_least']} | {_number(row['measured'])} |"
            for row in report["goals"]
        ),
        "",
        "| op, case | threads | engine | p50 us | p99 us | GOPS | of peak | fastrec is faster by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        faster = row["fastrec_is_faster_by"]
        low, high = faster["ci95"]
        compared = (
            "" if row["engine"] == "fastrec" else f"{faster['x']:.2f}x [{low:.2f}, {high:.2f}]"
        )
        share = "" if row["peak_share"] is None else f"{row['peak_share']:.0%}"
        lines.append(
            f"| {row['op']} {row['case']} | {row['threads']} | {row['engine']} | "
            f"{row['us']['p50']:.1f} | {row['us']['p99']:.1f} | {row['gops_kept']:.0f} | {share} | "
            f"{compared} |"
        )
    card = json.dumps(report["machine"], indent=2)
    return "\n".join([*lines, "", "## Machine", "", "```json", card, "```", ""])


def _number(value: float | None) -> str:
    return "not measured: no AVX-512 VNNI here" if value is None else f"{value:.3f}"


def main(
    out: Annotated[Path, typer.Option(help="Folder for kernels.json and kernels.md.")],
    threads: Annotated[list[int] | None, typer.Option(help="Default: 1 and all.")] = None,
) -> None:
    """Measure every op of the registry."""
    counts = threads or sorted({1, kernels.num_threads()})
    rows = [row for count in counts for row in measure(count)]
    report = {
        "machine": machine_card(),
        "ceilings": {
            "vpdpbusd_peak_gops": vpdpbusd_peak_gops(),
            "copy_gbs": copy_bandwidth_gbs(),
        },
        "goals": goals(rows) if 1 in counts else [],
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps(report, indent=2) + "\n")
    text = markdown(report)
    (out / "kernels.md").write_text(text)
    Console().print(text.split("## Machine")[0], markup=False)


if __name__ == "__main__":
    typer.run(main)
