"""The whole ranker on a GPU, in a handful of fused Triton launches and one CUDA graph.

With TRITON_INTERPRET=1 the same launches run on the CPU in Triton's interpreter: slow, for checks.
"""

from __future__ import annotations

import torch
from torch import nn

import fastrec
from fastrec import env
from fastrec.errors import BackendError
from fastrec.exporters.model_spec import quantised_module
from fastrec.kernels import _gpu
from fastrec.measure.packages import package_versions
from fastrec.runtime.backends._torch import reason_no_torch, torch_versions
from fastrec.runtime.engine import BuildOptions, Engine
from fastrec.runtime.native.lower import lower, program_spec
from fastrec.runtime.native.passes import simplify

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def can_run() -> str | None:
    """None, or why not."""
    return reason_no_torch() or _gpu.reason_missing(_device())


def versions() -> dict[str, str]:
    """Versions of fastrec, torch and triton, and the GPU's name."""
    gpu = torch.cuda.get_device_name() if _device() == "cuda" and torch.cuda.is_available() else ""
    return {
        "fastrec": fastrec.__version__,
        **torch_versions(),
        **package_versions("triton"),
        **({"gpu": gpu} if gpu else {}),
    }


def build(
    model: nn.Module, example_inputs: tuple[torch.Tensor, ...], options: BuildOptions
) -> Engine:
    """The model in its own precision, or a float one in bf16 or fp16; what ``fastrec.quantize_``
    made runs with its own integers. Setting: ``tower``, ``persistent`` (one launch, the default) or
    ``layers`` (one a layer).

    Raises:
        BackendError: the model is no ranker that the launches cover, and what stands in the way.
    """
    # Importing them imports triton, which may be missing.
    from fastrec.runtime.cuda.engine import CudaEngine, launch_rows
    from fastrec.runtime.cuda.executor import Executor
    from fastrec.runtime.cuda.match import match

    options.allow("tower")
    tower = options.setting("tower", ("persistent", "layers"), "persistent")
    quantised = quantised_module(model)
    precision = options.precision or ("fp32" if quantised is None else "int8")
    if (precision == "int8") != (quantised is not None):
        held = "holds no int8 module" if quantised is None else f"holds {quantised}, which is int8"
        raise BackendError(
            f"cuda runs an int8 model as it is, and this one {held}: fastrec.quantize_ makes them"
        )
    program = lower(model, example_inputs, options.spec)
    simplify(program)
    executor = Executor(
        match(program),
        dtype=_DTYPES.get(precision, torch.float32),
        device=torch.device(_device(), torch.cuda.current_device())
        if _device() == "cuda"
        else torch.device("cpu"),
        precision=_products(),
        persistent=tower == "persistent",
    )
    engine = CudaEngine(
        executor,
        backend="cuda",
        precision=precision,
        threads=options.threads,
        spec=program_spec(options.spec, program, example_inputs),
        rows=[],
        versions=versions(),
    )
    sizes = engine._sizes([tuple(t.shape) for t in example_inputs])
    engine._rows = launch_rows(
        engine.launches(*sizes), "fp32" if precision == "int8" else precision
    )
    return engine


def _device() -> str:
    return "cpu" if env.triton_interpret() else "cuda"


def _products() -> str:
    """How float32 is multiplied: as three TF32 products, whose error is float32's, where there are
    any; as TF32 where torch is told so."""
    if _device() == "cpu" or torch.version.hip is not None:
        return "ieee"
    if torch.cuda.get_device_capability() < (8, 0):
        return "ieee"
    return "tf32x3" if _gpu.fp32_precision() == "ieee" else "tf32"
