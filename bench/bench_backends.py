"""One exported file, several engines: agreement and speed of the five variants, with free sizes.

python bench/bench_backends.py [--out docs/results] : the canonical ranker with random weights is
exported once a variant; native runs the model, ONNX Runtime and OpenVINO (f32 hint) the file, at
batch {1, 8} x history {1, 50, 100} x candidates {1, 50}, then 200 more requests for the top 10.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import nn

import fastrec
from fastrec.models import Ranker, RankerConfig
from fastrec.runtime import machine_card
from fastrec.runtime.backends.onnxruntime import open_session
from fastrec.runtime.measure import interleaved
from fastrec.runtime.model_spec import quantised_module, spec_of

THREADS = 2
GRID = tuple(itertools.product((1, 8), (1, 50, 100), (1, 50)))


def variants() -> dict[str, nn.Module]:
    """The five variants; pruned in one round, because weights are random anyway."""
    torch.manual_seed(0)
    baseline = Ranker(RankerConfig.taobao()).eval()
    pruned = copy.deepcopy(baseline)
    fastrec.prune_(pruned, fastrec.BlockPruning(sparsity=0.4, rounds=1))
    spec = spec_of(baseline, ())
    drawn = [spec.sample({"B": 8, "L": 100, "m": 50}, seed=i) for i in range(4)]
    calibration = [tuple(map(torch.from_numpy, request)) for request in drawn]
    made: dict[str, nn.Module] = {"baseline": baseline, "pruned": pruned}
    for name, model in (("quantized", baseline), ("pruned_quantized", pruned)):
        made[name] = copy.deepcopy(model)
        fastrec.quantize_(made[name], fastrec.Int8(), calibration)
    made["distilled"] = Ranker(RankerConfig.taobao().student()).eval()
    return made


def engines(model: nn.Module, file: Path) -> dict[str, Callable[..., np.ndarray]]:
    """Name -> call of numpy inputs."""
    spec = spec_of(model, ())
    examples = spec.sample({"B": 2, "L": 100, "m": 50})
    fastrec.export(model, file, examples)
    session = open_session(file, threads=THREADS)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}
    request = ov.Core().compile_model(file, "CPU", hints).create_infer_request()

    def onnxruntime(*inputs: np.ndarray) -> np.ndarray:
        scores: np.ndarray = session.run(None, dict(zip(spec.names, inputs, strict=True)))[0]
        return scores

    def openvino(*inputs: np.ndarray) -> np.ndarray:
        scores: np.ndarray = request.infer(list(inputs), share_inputs=True)[0]
        return scores

    native = fastrec.compile(model, examples, "native", THREADS, fallback="error")
    return {"native": native, "onnxruntime": onnxruntime, "openvino": openvino}


def compare(name: str, model: nn.Module, file: Path) -> list[dict[str, Any]]:
    """A row an engine."""
    spec = spec_of(model, ())
    built = engines(model, file)
    worst = dict.fromkeys(built, 0.0)
    same: dict[str, list[bool]] = {engine: [] for engine in built}
    for seed, (batch, length, m) in enumerate((*GRID, *[(8, 100, 50)] * 25)):
        request = spec.sample({"B": batch, "L": length, "m": m}, seed=100 + seed)
        with torch.inference_mode():
            expected = model(*map(torch.from_numpy, request)).numpy()
        for engine, call in built.items():
            scores = call(*request)
            worst[engine] = max(worst[engine], float(np.abs(scores - expected).max()))
            if m > 10:
                tops = (np.argsort(-expected)[:, :10], np.argsort(-scores)[:, :10])
                same[engine] += [set(a) == set(b) for a, b in zip(*tops, strict=True)]
    example = spec.sample({"B": 1, "L": 100, "m": 50}, seed=9)
    taken = interleaved(built, [example], rounds=6, calls=4, seconds_budget=5)
    return [
        {
            "variant": name,
            "engine": engine,
            "precision": "fp32" if quantised_module(model) is None else "int8",
            "largest_error": worst[engine],
            "same_top_10": float(np.mean(same[engine])),
            "requests": len(same[engine]),
            "best_round_ms_b1": taken[engine].best_round_ms,
        }
        for engine in built
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the results page."""
    lines = [
        "# One export, several engines",
        "",
        "Canonical ranker, random weights, one ONNX file a variant with free sizes; against torch",
        "on the same model. Goals: fp32 error <= 1e-4; int8: the same top 10 of 50 in >= 99.5 % of",
        "requests. Times: B=1, L=100, m=50, 2 threads, quietest of 6 interleaved rounds on a",
        "shared machine. Made by `python bench/bench_backends.py`.",
        "",
        "| variant | engine | precision | largest error | same top 10 | requests | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['variant']} | {r['engine']} | {r['precision']} | {r['largest_error']:.2g} | "
        f"{100 * r['same_top_10']:.2f} % | {r['requests']} | {r['best_round_ms_b1']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    out = parser.parse_args().out
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in variants().items():
            rows += compare(name, model, Path(folder) / f"{name}.onnx")
    text = markdown(rows)
    print(text)
    (out / "backends.md").write_text(text)
    report = {"machine": machine_card(), "rows": rows}
    (out / "backends.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
