"""``sparse_int8_linear``'s CUDA kernel: emulated on the CPU, launched on a GPU where there is one,
and its machine code read."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_tools import ARCHITECTURES, machine_code, nvrtc_cubin, nvrtc_reason, resource_usage

from fastrec import env
from fastrec.errors import BackendError, CudaError
from fastrec.kernels import PackedWeight, _cuda, sparse_int8_linear
from fastrec.kernels._compiled import Signature
from fastrec.kernels._registry import Sample
from fastrec.kernels.sparse_int8_linear import SPEC, _gpu
from fastrec.kernels.sparse_int8_linear import _cuda as op
from fastrec.kernels.sparse_int8_linear._config import (
    CUDA_CONFIGS,
    CudaConfig,
    cuda_configs,
    cuda_heuristic,
)
from fastrec.kernels.sparse_int8_linear._device import (
    BANKS,
    STEP_GROUPS,
    DeviceWeight,
    device_weight,
)
from fastrec.kernels.sparse_int8_linear.samples import compare, random_weight, sample
from fastrec.kernels.sparse_int8_linear.sparsity_2_4 import fragments, keeps_two_of_four

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="nothing here is Triton's")
ROOT = Path(__file__).parents[3]
native = _cuda.compiled()
built = pytest.mark.skipif(native is None, reason="the CUDA part was not built: no nvcc")
WHY_NOT = SPEC.backends.can_run["cuda"](Signature("cuda"))
runs = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
# A fiber a thread: a block of 256 threads takes milliseconds.
SMALL = [case for case in SPEC.samples() if case.macs <= 300_000 and case.labels["rows"]]
NO_EPILOGUE = dict.fromkeys(("bias", "activation", "out", "out_scale", "out_zero_point"))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    library = tmp_path_factory.mktemp("emulator") / "emulated.so"
    here = Path(__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra"]
    flags += ["-Wno-unknown-pragmas", "-Wno-clobbered"]
    command = ["g++", *flags, f"-I{ROOT}/csrc/cuda", f"-I{here}"]
    source = here / "emulate_sparse_int8_linear.cpp"
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def prepared(packed: PackedWeight, kwargs: dict[str, Any]) -> _gpu.Prepared:
    return _gpu.prepare(packed, **(NO_EPILOGUE | kwargs))


def possible(weight: DeviceWeight) -> list[CudaConfig]:
    return cuda_configs(weight.paired, weight.two_four)


def emulated(emulator: ctypes.CDLL, case: Sample, seed: int = 0) -> None:
    (x, packed), kwargs = case.make()
    weight = prepared(packed, kwargs)
    for config in possible(weight.weight):
        # Eights beyond the end and in the beginning: what is not written shows.
        y = torch.full((len(x) + 1, packed.outputs), 77, dtype=weight.out_dtype)
        params = op.params_of(weight, x, y[:-1])
        assert emulator.emulate(emulated_index(config), ctypes.byref(params), seed), config
        compare(y[:-1], (x, packed), kwargs)
        assert bool((y[-1] == 77).all()), "written behind the end"


def emulated_index(config: CudaConfig) -> int:
    """Its place in params.cuh."""
    lines = (ROOT / "csrc/cuda/sparse_int8_linear/params.cuh").read_text().splitlines()
    listed = [line.split("X(")[1].split(")")[0] for line in lines if line.startswith("  X(")]
    return listed.index(op.template_arguments(config))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_configuration_agrees_when_emulated(emulator: ctypes.CDLL, case: Sample) -> None:
    emulated(emulator, case)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("inputs", [512, 513, 1040])
@pytest.mark.parametrize("two_four", [False, True])
def test_chunks_agree_in_any_order_of_threads(
    emulator: ctypes.CDLL, two_four: bool, inputs: int, density: float
) -> None:
    options = {"activation": "relu", "out": "uint8", "two_four": two_four}
    case = sample(9, 96, inputs, density=density, **options)
    emulated(emulator, case, seed=inputs)


def test_gelu_is_the_cpus_to_the_last_bit(emulator: ctypes.CDLL) -> None:
    if SPEC.backends.can_run["cpu"](Signature("cpu")) is not None:
        pytest.skip("the compiled CPU kernels are not here")
    (x, packed), kwargs = sample(16, 64, 36, activation="gelu").make()
    weight = prepared(packed, kwargs)
    y = torch.empty(16, 64)
    params = op.params_of(weight, x, y)
    assert emulator.emulate(0, ctypes.byref(params), 0)
    assert torch.equal(y, sparse_int8_linear(x, packed, **kwargs, backend="cpu"))


def test_the_structure_is_the_kernels(emulator: ctypes.CDLL) -> None:
    assert emulator.params_bytes() == ctypes.sizeof(op.Params)


@pytest.mark.parametrize("density", [1.0, 0.6, 0.25, 0.0])
@pytest.mark.parametrize(("outputs", "inputs"), [(33, 36), (128, 1200), (70, 2048)])
def test_the_device_form_is_the_weight(outputs: int, inputs: int, density: float) -> None:
    packed = random_weight(outputs, inputs, density, torch.Generator().manual_seed(0))
    form = device_weight(packed)
    groups = -(-inputs // 4)
    dense = torch.zeros(form.panels, groups, 32, 4, dtype=torch.int32)
    for panel in range(form.panels):
        for chunk in range(form.chunks):
            first, last = form.step_start[panel, chunk : chunk + 2].tolist()
            for step in range(first, last):
                for values, index in zip(form.values[step], form.index[step], strict=True):
                    assert int(index) // 128 == chunk
                    dense[panel, index] += values.view(32, 4)
    weight = dense.transpose(1, 2).reshape(form.panels * 32, groups * 4)
    assert torch.equal(weight[:outputs, :inputs], packed.unpack().int())
    assert torch.equal(form.offset.int(), form.index % 128 * 4)
    kept = len(packed.group_index)
    if not form.paired:
        assert form.values.shape[0] * STEP_GROUPS <= kept + form.panels * form.chunks * 7


def test_the_2_4_form_is_what_torch_hands_to_sparse_tensor_cores() -> None:
    """Its conversion follows CUTLASS: kept weights row by row, and the words of metadata in the
    order in which the lanes of a warp hold them."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
    )

    packed = random_weight(32, 64, 1.0, torch.Generator().manual_seed(0), two_four=True)
    assert keeps_two_of_four(packed)
    values, meta = fragments(packed.values)
    assert (values.shape, meta.shape) == ((1, 2, 32, 16), (1, 2, 32))
    for half in range(2):
        dense = packed.unpack()[16 * half : 16 * half + 16]
        kept, words = sparse_semi_structured_from_dense_cutlass(dense)
        assert torch.equal(meta[0, half], words.flatten())
        for lane in range(32):
            g, t = lane // 4, lane % 4
            for i in range(4):
                # Register i: what is kept of inputs 8 t (+ 32) on, of row g (+ 8).
                row, first = g + i % 2 * 8, 4 * t + i // 2 * 16
                assert torch.equal(
                    values[0, half, lane, 4 * i : 4 * i + 4], kept[row, first : first + 4]
                )


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_the_2_4_form_takes_five_eighths_of_the_bytes(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = random_weight(1024, 1024, density, generator, two_four=True)
    form, plain = device_weight(packed, two_four=True), device_weight(packed)
    assert form.meta is not None
    assert form.paired == plain.paired
    stored = form.values.nbytes + form.meta.nbytes
    # Chunks of some 51 groups fill up to 64 where the other form fills up to 56.
    assert stored <= plain.values.nbytes * (0.625 if density == 1 else 0.625 * 64 / 56)


def test_only_weights_of_that_form_take_it() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not keeps_two_of_four(random_weight(64, 64, 1.0, generator))
    assert not keeps_two_of_four(random_weight(64, 64, 0.0, generator))
    assert keeps_two_of_four(random_weight(64, 64, 0.3, generator, two_four=True))
    one = torch.zeros(32, 8, dtype=torch.int8)
    one[:, 1], one[3, 7] = -5, 4
    assert keeps_two_of_four(PackedWeight.pack(one, torch.ones(32)))


def test_neighbouring_groups_lie_in_different_banks() -> None:
    packed = random_weight(1024, 1024, 0.5, torch.Generator().manual_seed(0))
    banks = device_weight(packed).index.view(-1, 4) % BANKS
    apart = torch.tensor([len(set(four)) == 4 for four in banks.tolist()])
    # By chance a tenth is; what is not here is what a chunk keeps more of one bank than of others.
    assert float(apart.float().mean()) > 0.7


def test_panels_are_paired_where_they_keep_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    assert device_weight(random_weight(96, 64, 1.0, generator)).paired
    assert not device_weight(random_weight(96, 64, 0.5, generator)).paired
    assert not device_weight(random_weight(32, 64, 1.0, generator)).paired


def test_the_heuristic_chooses_what_is_compiled_and_fits() -> None:
    kinds = list(itertools.product((False, True), repeat=2))
    for rows in (1, 8, 9, 50, 400, 3200, 100_000):
        for panels, (paired, two_four) in itertools.product((1, 2, 31, 32, 128), kinds):
            config = cuda_heuristic(rows, panels, paired, two_four)
            assert config in CUDA_CONFIGS
            assert paired or config.wide == 1
            assert config.two_four == two_four
            assert config.shared_bytes <= 163 * 1024
    assert cuda_heuristic(1, 32, True).rows == 8
    assert cuda_heuristic(3200, 32, True) == CudaConfig(64, 2, 4, 1, 1)
    assert cuda_heuristic(4096, 128, True, True).rows == 128


@built
def test_the_compiled_configurations_are_those_known_here() -> None:
    assert native is not None
    module = native.sparse_int8_linear
    found = {tuple(sizes) for sizes in module.configurations()}
    assert found == {astuple(config) for config in CUDA_CONFIGS}
    assert module.params_bytes == ctypes.sizeof(op.Params)
    for config in CUDA_CONFIGS:
        sizes = (config.rows, config.wide, config.panels, config.slices)
        assert module.shared_bytes(*sizes) == config.shared_bytes


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_launch_without_a_driver_raises_a_typed_error() -> None:
    assert native is not None
    with pytest.raises(CudaError, match=r"sparse_int8_linear: CUDA error (35|100)"):
        native.sparse_int8_linear.launch(0, op.Params(rows=1, panels=1), 0)
    with pytest.raises(CudaError, match="invalid argument"):
        native.sparse_int8_linear.launch(99, op.Params(rows=1, panels=1), 0)
    with pytest.raises(CudaError, match="invalid argument"):  # the other form of the weight
        native.sparse_int8_linear.launch(len(CUDA_CONFIGS) - 1, op.Params(rows=1, panels=1), 0)
    with pytest.raises(CudaError, match="parameters: CUDA error 1"):
        native.sparse_int8_linear.launch(0, bytes(8), 0)


def test_a_cpu_tensor_is_refused_with_a_reason() -> None:
    (x, packed), kwargs = sample(2, 32, 16).make()
    with pytest.raises(BackendError, match=r"'cuda' can't run: it runs on a GPU, .* is on cpu"):
        sparse_int8_linear(x, packed, **kwargs, backend="cuda")


DENSE = "IMMA.16832.S8.U8"


def check_machine_code(binary: Path, arch: str | None) -> None:
    usage = {k: v for k, v in resource_usage(binary, arch).items() if "18sparse_int8_linear" in k}
    code = machine_code(binary, arch)
    assert len(usage) == len(CUDA_CONFIGS)
    for name, resources in usage.items():
        assert (resources["STACK"], resources["LOCAL"]) == (0, 0), f"{name}: registers are spilled"
        instruction = "IMMA.SP.16864.S8.U8" if name.endswith("Lb1EEEvNS0_6ParamsE") else DENSE
        assert code[name].count(instruction) >= 2, f"{name}: not on matrix units"
        assert "LDGSTS" in code[name], f"{name}: copies are not asynchronous"


@built
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_compiled_kernels_run_on_matrix_units_unspilled(arch: str) -> None:
    assert native is not None
    assert native.__file__ is not None
    check_machine_code(Path(native.__file__), arch)


@pytest.mark.skipif(nvrtc_reason() is not None, reason=str(nvrtc_reason()))
def test_what_cupy_would_compile_runs_on_matrix_units_unspilled(tmp_path: Path) -> None:
    names = tuple(op.kernel_name(config) for config in CUDA_CONFIGS)
    binary = tmp_path / "kernels.cubin"
    binary.write_bytes(nvrtc_cubin(_cuda.source(op.HEADER), "sm_90a", names))
    check_machine_code(binary, None)


@runs
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_configuration_agrees_on_a_gpu(case: Sample) -> None:
    (x, packed), kwargs = case.make()
    there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    weight = prepared(packed.to("cuda"), there)
    for config in possible(weight.weight):
        y = torch.empty(len(x), packed.outputs, dtype=weight.out_dtype, device="cuda")
        op.run(weight, x.cuda(), y, config)
        compare(y.cpu(), (x, packed), kwargs)
    actual = sparse_int8_linear(x.cuda(), packed.to("cuda"), **there, backend="cuda")
    compare(actual.cpu(), (x, packed), kwargs)
