"""The engine's scores against the converted torch model's: agreement.json, agreement.md.

``python bench/bench_agreement.py --out DIR``. Requests of the canonical ranker, one at a time to
the engine, with histories of every length from none to the longest; weights are random. Per
variant:

top 10     share of requests whose ten best of 50 candidates are the same ten
integers   share of requests in which all 50 x 1024 values that the last int8 layer hands on are the
           same bits: they are a function of every integer before them
error      root mean square distance from the model with all its float parts in float64, ours over
           torch's own: within 2 where the engine is as exact as torch
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import nn

import fastrec
from bench_ranker import VARIANTS, request, variant
from fastrec.compress.selection import set_module
from fastrec.kernels.sparse_int8_linear.reference import accumulate
from fastrec.measure.machine import machine_card
from fastrec.models import Ranker, RankerConfig
from fastrec.nn import Int8Embedding, SparseInt8Linear
from fastrec.runtime.engine import Engine

TOP = 10
GOAL_TOP = 0.999
GOAL_ERROR = 2.0
BATCH = 25


class ExactInt8Linear(nn.Module):
    """A layer's integers, with the arithmetic around them in float64."""

    def __init__(self, layer: SparseInt8Linear) -> None:
        super().__init__()
        self.layer, self.weight = layer, layer.packed.unpack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer, scale = self.layer, self.layer.x_scale.double()
        zero = int(layer.x_zero_point)
        if x.is_floating_point():
            x = _quantised(x, scale, zero)
        y = accumulate(x.flatten(0, -2), self.weight, zero).double() * scale * layer.w_scale
        y = y.unflatten(0, x.shape[:-1])
        if layer.bias is not None:
            y = y + layer.bias
        if layer.activation is not None:
            y = getattr(torch.nn.functional, layer.activation)(y)
        if layer.out_scale is None:
            return y
        return _quantised(y, layer.out_scale.double(), int(layer.out_zero_point))


class ExactInt8Embedding(nn.Module):
    """A table's rows in float64."""

    def __init__(self, table: Int8Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table.weight[ids].double() * self.table.scale[ids].double().unsqueeze(-1)


def _quantised(x: torch.Tensor, scale: torch.Tensor, zero: int) -> torch.Tensor:
    return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy whose float parts compute in float64."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, SparseInt8Linear):
            set_module(twin, name, ExactInt8Linear(module))
        elif isinstance(module, Int8Embedding):
            set_module(twin, name, ExactInt8Embedding(module))
        elif isinstance(module, nn.Linear):
            # INT8 attention hands float32 to a projection that stayed float.
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.double() for x in inputs))
    return twin.double()


def without_the_last_layer(model: Ranker) -> Ranker:
    """The same model up to what its last int8 layer hands on: [B, m, width] for [B, m]."""
    cut = copy.deepcopy(model)
    cut.tower = cut.tower[:-1]
    return cut


def batches(config: RankerConfig, requests: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Requests with histories of any length, padded with id 0, BATCH at a time."""
    draw = torch.Generator().manual_seed(seed)
    for first in range(0, requests, BATCH):
        count = min(BATCH, requests - first)
        item, category, behaviour, _, *candidates = request(config, count, seed + 1 + first)
        length = torch.randint(0, config.history_length + 1, (count,), generator=draw)
        valid = torch.arange(config.history_length) < length[:, None]
        yield item * valid, category * valid, behaviour * valid, length, *candidates


def served(engine: Engine, batch: tuple[torch.Tensor, ...]) -> np.ndarray:
    """The engine's answers, one request at a time."""
    rows = [tuple(t[i : i + 1].numpy() for t in batch) for i in range(len(batch[0]))]
    return np.concatenate([engine(*row) for row in rows])


def best(scores: np.ndarray) -> np.ndarray:
    """The positions of the ten best candidates [B, 10], sorted."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, :TOP], axis=-1)


def compare(
    model: Ranker, *, threads: int, requests: int, integers: int, exact: int, seed: int = 100
) -> dict[str, Any]:
    """One variant: agreement on ``requests``, bits on ``integers``, errors on ``exact``."""
    config, settings = model.config, {"executor": "plan"}
    examples = request(config, 1, seed=2)

    def built(network: nn.Module) -> Engine:
        return fastrec.compile(network, examples, "native", threads, settings=settings)

    row: dict[str, Any] = {"requests": requests}
    with torch.inference_mode(), built(model) as engine:
        same, worst = 0, 0.0
        for batch in batches(config, requests, seed):
            ours, theirs = served(engine, batch), model(*batch).numpy()
            same += int((best(ours) == best(theirs)).all(-1).sum())
            worst = max(worst, float(np.abs(ours - theirs).max()))
        row |= {"top_10_same": same / requests, "largest_difference": worst}
        twin, squares = in_float64(model), np.zeros(2)
        for batch in batches(config, exact, seed + 1):
            truth = twin(*batch).numpy()
            errors = served(engine, batch) - truth, model(*batch).numpy() - truth
            squares += [float((e**2).sum()) for e in errors]
        ours_rms, torch_rms = np.sqrt(squares / (exact * 50))
        row |= {"exact_requests": exact, "rms_error": ours_rms, "rms_error_torch": torch_rms}
    if any(isinstance(m, SparseInt8Linear) for m in model.modules()):
        cut = without_the_last_layer(model)
        with torch.inference_mode(), built(cut) as engine:
            same = 0
            for batch in batches(config, integers, seed + 2):
                same += int((served(engine, batch) == cut(*batch).numpy()).all((-1, -2)).sum())
        row |= {"integer_requests": integers, "integers_same": same / integers}
    return row


def main(
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    threads: Annotated[int, typer.Option(help="Threads a call may use.")] = 2,
    requests: Annotated[int, typer.Option(help="Compared by their ten best.")] = 5000,
    integers: Annotated[int, typer.Option(help="Compared bit by bit.")] = 1000,
    exact: Annotated[int, typer.Option(help="Held against float64.")] = 200,
) -> None:
    """Compare the variants of the canonical ranker with their engines."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    base = Ranker(RankerConfig.taobao()).eval()
    rows = []
    for name, of in VARIANTS.items():
        Console(stderr=True).print(name)
        found = compare(
            variant(base, of.sparsity, of.attention),
            threads=threads,
            requests=requests,
            integers=integers,
            exact=exact,
        )
        rows.append({"variant": name, **found})
    report = {"machine": machine_card(), "threads": threads, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "agreement.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (out / "agreement.md").write_text(text)
    Console().print(text, markup=False)


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    machine = report["machine"]
    lines = [
        "# The engine against the converted torch model",
        "",
        f"{machine['cpu']}, {report['threads']} threads; commit {machine.get('commit')}. Canonical "
        "ranker, random weights, histories of 0 to 100 events, 50 candidates.",
        "",
        "| variant | requests | same top 10 | goal | largest difference | integers the same | "
        "error / torch's own | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        share = row["rms_error"] / row["rms_error_torch"]
        integers = ""
        if "integers_same" in row:
            integers = f"{row['integers_same']:.2%} of {row['integer_requests']:,}"
        lines.append(
            f"| {row['variant']} | {row['requests']:,} | {row['top_10_same']:.2%} | "
            f">= {GOAL_TOP:.1%}: {_verdict(row['top_10_same'] >= GOAL_TOP)} | "
            f"{row['largest_difference']:.1e} | {integers} | {row['rms_error']:.1e} / "
            f"{row['rms_error_torch']:.1e} = {share:.2f} | <= {GOAL_ERROR:g}: "
            f"{_verdict(share <= GOAL_ERROR)} |"
        )
    return "\n".join([*lines, ""])


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


if __name__ == "__main__":
    typer.run(main)
