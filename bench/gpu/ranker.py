"""The canonical ranker beside torch, torch.compile, ONNX Runtime and TensorRT."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import torch

import fastrec
from fastrec.exporters.model_spec import spec_of
from fastrec.models import Ranker, RankerConfig
from gpu.sheet import MOST_SETS, Contender, Row, Sheet, Work
from gpu.timing import Call, Replay

LENGTH, CANDIDATES = 100, 50
# A tower that lacks 40 % of its groups: another model, which rivals are not held against.
PRUNED = "pruned int8"
Inputs = tuple[torch.Tensor, ...]


def batch_1(sheet: Sheet) -> None:
    """One user."""
    measure(sheet, 1)


def batch_8(sheet: Sheet) -> None:
    """Eight."""
    measure(sheet, 8)


def batch_64(sheet: Sheet) -> None:
    """Sixty-four."""
    measure(sheet, 64)


def model(gpu: bool) -> Ranker:
    """The canonical ranker; with small tables where only its launches are looked at."""
    torch.manual_seed(0)
    canonical = RankerConfig.taobao()
    rows = {} if gpu else {"n_items": 2000, "n_categories": 500}
    return Ranker(RankerConfig(**{**canonical.to_dict(), **rows})).eval()


def request(ranker: Ranker, batch: int, seed: int = 0) -> Inputs:
    """Full histories."""
    sizes = {"B": batch, "L": LENGTH, "m": CANDIDATES}
    arrays = spec_of(ranker, ()).sample(sizes, seed=seed)
    arrays[3][:] = LENGTH
    return tuple(map(torch.from_numpy, arrays))


def quantised(ranker: Ranker, sparsity: float = 0.0) -> Ranker:
    """Its int8 twin; with a share of the tower's groups pruned."""
    twin = Ranker(ranker.config).eval()
    twin.load_state_dict(ranker.state_dict())
    if sparsity:
        config = fastrec.BlockPruning(sparsity=sparsity, rounds=1)
        fastrec.prune_(twin, config, filter_fn=lambda _, name: name.startswith("tower"))
    fastrec.quantize_(twin, fastrec.Int8(), calibration=[request(twin, 8, 1)])
    return twin


def bound(ranker: Ranker, inputs: Inputs, precision: str) -> Row:
    """What a request's launches must move and multiply, and the least time of an H200's data
    sheet for them."""
    from fastrec.runtime.cuda.config import Sizes
    from fastrec.runtime.cuda.engine import launch_rows
    from fastrec.runtime.cuda.launches import Bucket
    from fastrec.runtime.cuda.match import match
    from fastrec.runtime.cuda.weights import Weights
    from fastrec.runtime.native.lower import lower
    from fastrec.runtime.native.passes import simplify

    program = lower(ranker, inputs, spec_of(ranker, inputs))
    simplify(program)
    stages = match(program)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = Weights(stages, dtype, torch.device("cpu"))
    bucket = Bucket(stages, weights, Sizes(len(inputs[0]), LENGTH, CANDIDATES), "ieee", True)
    total = launch_rows(bucket.launches, "tf32" if precision == "int8" else precision)[-1]
    found = {"moved": total["bytes"], "macs": total["flops"] // 2, "launches": total["launches"]}
    return found | {"bound_us": total["roofline_us"]["H200"], "dtype": precision}


def name_of(precision: str) -> str:
    """Ours, as a row's engine."""
    return f"{PRUNED}, fastrec" if precision == PRUNED else f"fastrec, {precision}"


def measure(sheet: Sheet, batch: int) -> None:
    """Every engine at one batch, ours first."""
    whole = model(sheet.gpu)
    inputs = request(whole, batch)
    twins: dict[str, Ranker] = {"bf16": whole}
    try:
        twins["int8"] = quantised(whole)
        twins[PRUNED] = quantised(whole, 0.4)
    except Exception as error:  # the float rows do not need it
        sheet.add(what=f"ranker B={batch}", engine="fastrec, int8", why=str(error))
    if not sheet.gpu:
        for precision, twin in twins.items():
            row = bound(twin, inputs, "bf16" if precision == "bf16" else "int8")
            why = "not measured: torch sees no CUDA device"
            sheet.add(what=f"ranker B={batch}", engine=name_of(precision), why=why, **row)
        _try_small(sheet, batch)
        return
    total = bound(whole, inputs, "bf16")
    work = Work(total["moved"], total["macs"], "bf16")
    contenders = {name_of(name): ours(twin, name, batch) for name, twin in twins.items()}
    contenders |= {"torch, bf16": torchs(whole, sheet, None)}
    compiled = "torch.compile{}, CUDA graph, bf16"
    contenders[compiled.format("")] = torchs(whole, sheet, "default")
    contenders |= adapters(twins, batch)
    # Last, because it may take all the time that is left.
    autotuned = torchs(whole, sheet, "max-autotune-no-cudagraphs")
    contenders[compiled.format(" max-autotune")] = autotuned
    with torch.inference_mode():
        sheet.compare(f"ranker B={batch}", work, lambda: inputs, contenders, scores_of(whole))


def scores_of(ranker: Ranker) -> Callable[..., torch.Tensor]:
    """What torch says, on the CPU."""

    def expected(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return ranker(*inputs)

    return expected


def noise(actual: Any, expected: torch.Tensor) -> str | None:
    """Scores of 16 bits are off by a few percent of their spread; those of other models by all."""
    found = torch.as_tensor(actual).float().cpu()
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}"
    share = float((found - expected).abs().mean() / expected.std())
    return None if share < 0.1 else f"off by {share:.2g} of the scores' spread"


def ours(twin: Ranker, precision: str, batch: int) -> Contender:
    """``backend="cuda"``; its own graph is what is timed."""

    @functools.cache
    def engine() -> Any:
        wanted = precision if precision == "bf16" else None
        return fastrec.compile(twin, request(twin, batch), "cuda", precision=wanted)

    def prepare(*inputs: torch.Tensor) -> Call:
        arrays = [t.numpy() for t in inputs]
        return lambda: engine()(*arrays)

    def replay() -> Replay:
        from fastrec.runtime.cuda.config import Sizes

        launches = engine()._executor.staged(Sizes(batch, LENGTH, CANDIDATES)).bucket.launches
        return Replay.of([lambda: [launch() for launch in launches]] * MOST_SETS)

    note = "host: inputs from and scores to the host's memory"
    return Contender(prepare, scores_of(twin), check=noise, replay=replay, note=note)


def torchs(ranker: Ranker, sheet: Sheet, mode: str | None) -> Contender:
    """torch on inputs that are on the GPU; compiled ones are captured as ours are."""

    @functools.cache
    def call() -> Any:
        there = Ranker(ranker.config).eval()
        there.load_state_dict(ranker.state_dict())
        there = there.to(sheet.device, torch.bfloat16)
        return there if mode is None else torch.compile(there, mode=mode, dynamic=False)

    def prepare(*inputs: torch.Tensor) -> Call:
        moved = [t.to(sheet.device) for t in inputs]
        return lambda: call()(*moved)

    return Contender(prepare, check=noise, note="host: inputs on the GPU, no graph")


def adapters(twins: dict[str, Ranker], batch: int) -> dict[str, Contender]:
    """Other engines through fastrec's adapters, or the reason why not; host times alone."""

    def contender(
        backend: str, ranker: Ranker, precision: str | None, **settings: Any
    ) -> Contender:
        @functools.cache
        def engine() -> Any:
            if backend == "onnxruntime":
                return onnxruntime_cuda(ranker, request(ranker, batch))
            return fastrec.compile(
                ranker, request(ranker, batch), backend, precision=precision, settings=settings
            )

        def prepare(*inputs: torch.Tensor) -> Call:
            arrays = [t.numpy() for t in inputs]
            return lambda: engine()(*arrays)

        return Contender(prepare, scores_of(ranker), check=noise, device=False)

    found = {
        "ONNX Runtime CUDA, fp32": contender("onnxruntime", twins["bf16"], None),
        "TensorRT, fp16": contender("tensorrt", twins["bf16"], "fp16"),
    }
    if "int8" in twins:
        found["TensorRT, int8"] = contender("tensorrt", twins["int8"], None)
    return found


def onnxruntime_cuda(ranker: Ranker, inputs: Inputs) -> Callable[..., Any]:
    """A session on the GPU of what ``fastrec.export`` writes; the adapter's own is for the CPU."""
    import tempfile
    from pathlib import Path

    if importlib.util.find_spec("onnxruntime") is None:
        raise ModuleNotFoundError("onnxruntime is not installed")
    import onnxruntime

    provider = "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ModuleNotFoundError(f"this onnxruntime has no {provider}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ranker.onnx"
        fastrec.export(ranker, file, inputs)
        session = onnxruntime.InferenceSession(str(file), providers=[provider])
    if provider not in session.get_providers():
        raise RuntimeError(f"{provider} did not load: it fell back to the CPU")
    names = [i.name for i in session.get_inputs()]

    def run(*arrays: Any) -> Any:
        return session.run(None, dict(zip(names, arrays, strict=True)))[0]

    return run


def tune(sheet: Sheet) -> None:
    """Tiles of the tower at the batches of the report, for its rankers; the sections that follow
    take them."""
    from fastrec.runtime.cuda import tuning

    whole = model(sheet.gpu)
    twins = {"int8": quantised(whole), PRUNED: quantised(whole, 0.4), "bf16": whole}
    for precision, twin in twins.items():
        wanted = precision if precision == "bf16" else None
        executor = fastrec.compile(twin, request(twin, 1), "cuda", precision=wanted)._executor
        for batch in (1, 8, 64):
            said = tuning.tune_tower(executor, batch, CANDIDATES)
            sheet.add(what=f"tuning, {precision}", engine="fastrec", best=said)
            table = tuning.table(executor.device)
            assert table is not None
            text = json.dumps({table.path.name: table.content()}, indent=1)
            (sheet.out / "tuned_tower.json").write_text(text + "\n")


def _try_small(sheet: Sheet, batch: int) -> None:
    """What a GPU would run, on a small ranker in the interpreter; once is enough."""
    if batch != 1:
        return
    config = {"n_items": 300, "n_categories": 30, "history_length": LENGTH, "d": 16}
    config |= {"category_dim": 8, "n_heads": 2, "ffn": 40, "tower": (48, 32)}
    torch.manual_seed(0)
    small = Ranker(RankerConfig(**config)).eval()
    twins = {"bf16": small, "int8": quantised(small), PRUNED: quantised(small, 0.5)}
    inputs = request(small, batch)
    contenders = {name_of(name): ours(twin, name, batch) for name, twin in twins.items()}
    contenders["torch, bf16"] = torchs(small, sheet, None)
    contenders |= adapters(twins, batch)
    with torch.inference_mode():
        what = "a small ranker, tried"
        sheet.compare(what, Work(0, 0, "bf16"), lambda: inputs, contenders, scores_of(small))
