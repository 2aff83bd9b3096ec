"""A report of ``fastrec autotune`` as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrec.search.result import summary


def markdown(report: Mapping[str, Any]) -> str:
    """Points, the chosen choices and the cost model of a report as the command writes it."""
    budget, chosen, test = report["budget"], report["chosen"], report["test"]
    limits = [f"{budget[n]:g} {unit}" for n, unit in (("latency_ms", "ms"), ("size_mb", "MB"))
              if budget[n] is not None]  # fmt: skip
    difference = test["difference"]
    lines = [
        f"# autotune: at most {' and '.join(limits)}, batch {budget['batch']}",
        "",
        f"On {report['machine']['cpu']}, {report['threads']} thread(s). Test {report['metric']} on "
        f"{test['users']:,} users: {test['best']:.4f}, the model as it came "
        f"{test['baseline']:.4f}, paired difference {difference['mean']:+.4f} "
        f"({difference['low']:+.4f} to {difference['high']:+.4f}).",
        "",
        f"## Points, measured (quality: {report['metric']} on validation events)",
        "",
        "| | quality | ms | predicted | MB | predicted | round | choices |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in sorted(report["points"], key=lambda p: p["latency_ms"]):
        same = p["key"] == chosen["key"] and p["round"] == chosen["round"]
        mark = "**chosen**" if same else "" if p["within"] else "over"
        mark += " front" if p["key"] in report["front"] and not same else ""
        lines.append(
            f"| {mark.strip()} | {p['quality']:.4f} | {p['latency_ms']:.3f} | "
            f"{p['predicted_ms']:.3f} | {p['size_mb']:.3f} | {p['predicted_mb']:.3f} | "
            f"{p['round']} | {summary(p['chosen'])} |"
        )
    again = chosen["latency_again_ms"]
    lines += [
        "",
        "Round 0 is the model as it came, without fine-tuning. The chosen model, compiled and "
        f"timed once more at the end: {again:.3f} ms.",
        "",
        "## What was chosen, and what each layer's choice costs",
        "",
        "| layer | choice | us | as it was | bytes | as it was | quality lost alone, untrained |",
        "|---|---|---|---|---|---|---|",
    ]
    for unit, name in chosen["chosen"].items():
        costs, first = report["costs"][unit][name], next(iter(report["costs"][unit].values()))
        loss = report["losses"][unit][name]
        lines.append(
            f"| `{unit}` | {name} | {costs['us']:.1f} | {first['us']:.1f} | {costs['bytes']:,} | "
            f"{first['bytes']:,} | {loss:.4f} |"
        )
    lines += [f"\nNo choice for `{name}`: {why}." for name, why in report["left"].items()]
    model = report["cost_model"]
    if model is not None:
        lines += ["", "## The cost model", "", f"{model['verdict']}.", "", *_fits(model)]
    return "\n".join(lines) + "\n"


def _fits(model: Mapping[str, Any]) -> list[str]:
    lines = [
        "Microseconds; coefficients per 10^6 multiply-adds or bytes. Residuals are measured - "
        "predicted: their 5th, 50th and 95th percentile.",
        "",
        "| fitted to | form | coefficients | R^2 | typical error | worst | residuals |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, fits in (("layers", model["layers"]), ("whole calls", model["models"])):
        for fit in fits.values():
            rests = sorted(
                m - p for m, p in zip(fit["measured_us"], fit["predicted_us"], strict=True)
            )
            shown = ", ".join(
                f"{rests[round(q * (len(rests) - 1))]:+.2f}" for q in (0.05, 0.5, 0.95)
            )
            values = ", ".join(f"{name} {value:.3g}" for name, value in fit["coefficients"].items())
            lines.append(
                f"| {len(rests)} {what} | {fit['form']} | {values} | {fit['r2']:.3f} | "
                f"{fit['relative_error']:.0%} | {fit['worst']:.0%} | {shown} |"
            )
    return lines
