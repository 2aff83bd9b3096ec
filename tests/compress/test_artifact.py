"""save and load: exact round trips, small files, and typed errors for every kind of damage."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrec.compress import (
    QAT,
    BlockPruning,
    Int8,
    artifact_bytes,
    load,
    prune_,
    quantize_,
    read_manifest,
    save,
)
from fastrec.compress.artifact import _own_hash
from fastrec.compress.codec import decode, encode
from fastrec.errors import ArgumentError, ArtifactError, DtypeError, FastrecError
from fastrec.models import Ranker, RankerConfig, SASRec, SASRecConfig

CONFIG = RankerConfig(
    n_items=1200, n_categories=60, history_length=12, d=32, ffn=64, tower=(64, 64), n_blocks=1
)


def inputs(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    return (
        ids(1200, 4, 12),
        ids(60, 4, 12),
        ids(5, 4, 12),
        torch.tensor([0, 1, 5, 12]),
        ids(1200, 4, 7),
        ids(60, 4, 7),
    )


def ranker() -> Ranker:
    torch.manual_seed(0)
    return Ranker(CONFIG).eval()


def variant(name: str) -> nn.Module:
    model: nn.Module = ranker()
    if name == "distilled":
        torch.manual_seed(1)
        return Ranker(CONFIG.student(0.6)).eval().to(torch.bfloat16)
    if "pruned" in name:
        prune_(model, BlockPruning(sparsity=0.4, rounds=1))
    if "quantized" in name:
        quantize_(model, Int8(), calibration=[inputs()])
    return model


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    "name", ["baseline", "quantized", "pruned", "pruned_quantized", "distilled"]
)
def test_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    model = variant(name)
    path = save(model, tmp_path / name, info={"variant": name})
    again = load(path)
    same(model, again)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in again.named_modules()
    ]
    assert torch.equal(model(*inputs()), again(*inputs()))
    assert not again.training
    assert read_manifest(path)["info"] == {"variant": name}
    assert sorted(p.name for p in path.iterdir()) == ["model.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]  # no temporary folder is left


def test_sasrec_and_a_second_save_over_the_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(n_items=50, max_length=8, d=16, ffn=32))
    save(model, tmp_path / "m")
    with torch.no_grad():
        model.item_embedding.weight += 1
    save(model, tmp_path / "m")
    same(model, load(tmp_path / "m"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 32)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 1000, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(self.table(ids))


def test_users_own_class_is_filled_and_ties_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Own().eval()
    save(model, tmp_path / "float")
    assert read_manifest(tmp_path / "float")["tensors"]["head.weight"]["codec"] == "alias"
    assert artifact_bytes(tmp_path / "float") < 1.2 * 4 * 36_192 + 8_000
    quantize_(
        model, Int8(), calibration=[torch.arange(100)], filter_fn=lambda m, name: name != "head"
    )
    save(model, tmp_path / "int8")
    with pytest.raises(ArgumentError, match=r"load\(path, model=\.\.\.\)"):
        load(tmp_path / "int8")
    torch.manual_seed(7)
    again = load(tmp_path / "int8", Own())
    same(model, again)
    assert torch.equal(model(torch.arange(9)), again(torch.arange(9)))
    same(model, load(tmp_path / "int8", copy.deepcopy(model)))  # the quantised structure fits too
    with pytest.raises(ArtifactError, match="has no module"):
        load(tmp_path / "int8", nn.Linear(2, 2))
    wider = Own()
    wider.net[0] = nn.Linear(32, 96)
    with pytest.raises(ArtifactError, match=r"net\.0"):
        load(tmp_path / "int8", wider)
    assert isinstance(wider.table, nn.Embedding)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    columns=st.sampled_from([4, 16, 32, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.int32]),
    zero=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_codecs_are_exact_to_the_bit(
    rows: int, columns: int, dtype: torch.dtype, zero: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(rows, columns, generator=generator) * 50).to(dtype)
    tensor[torch.rand(rows, columns, generator=generator) < zero] = 0
    if dtype.is_floating_point and rows:
        tensor[0] = -0.0  # not a zero to be dropped: its sign must come back
    back = decode(*encode({"t": tensor}))["t"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8)) or tensor.numel() == 0


def test_masked_codec_costs_what_the_formula_says() -> None:
    table = torch.randn(1000, 128)
    keep = torch.rand(1000, 32) >= 0.4
    table[~keep.repeat_interleave(4, 1)] = 0.0
    stored, entries = encode({"t": table})
    assert entries["t"]["codec"] == "masked"
    size = sum(t.nbytes for t in stored.values())
    assert size == int(keep.sum()) * 16 + 32_000 // 8
    narrow, entries = encode({"index": torch.arange(2000, dtype=torch.int32)})
    assert entries["index"]["codec"] == "narrow"
    assert narrow["index"].nbytes == 4000
    assert encode({"i": torch.full((2000,), -1)})[1]["i"]["codec"] == "raw"


def test_single_zeros_and_int8_codes_cost_about_their_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(1000, 128, generator=generator) * 12).round().clamp(-31, 31)
    stored, entries = encode({"t": codes.to(torch.int8)})
    assert entries["t"] == {"dtype": "int8", "shape": [1000, 128], "codec": "raw", "huffman": [""]}
    share = torch.bincount(codes.long().flatten() + 31) / codes.numel()
    entropy = -(share * share.clamp_min(1e-9).log2()).sum() / 8  # bytes a code
    assert entropy < stored["t"].numel() / codes.numel() < 1.02 * entropy
    codes[torch.rand(codes.shape, generator=generator) < 0.75] = 0
    stored, entries = encode({"t": codes.to(torch.int8)})
    assert (entries["t"]["codec"], entries["t"]["group"]) == ("masked", 1)
    assert entries["t"]["huffman"] == ["", "#mask"]
    assert torch.equal(decode(stored, entries)["t"], codes.to(torch.int8))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [1000, 127]}, "does not hold just"),
        ({"shape": [1000, 129]}, "does not hold just"),
        ({"shape": [10**9, 10**9]}, "cannot hold"),
        ({"dtype": "float32"}, "not a coded tensor of bytes"),
        ({"huffman": [""], "codec": "masked", "group": 3}, "groups of 3 do not fit"),
        ({"huffman": "no"}, "bad list"),
        ({"huffman": []}, "expected torch.int8"),
    ],
)
def test_a_forged_entry_of_a_coded_tensor_is_refused(entry: dict[str, Any], message: str) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(1000, 128, generator=generator) * 12).to(torch.int8)
    stored, entries = encode({"t": codes})
    with pytest.raises(ArtifactError, match=message):
        decode(stored, {"t": entries["t"] | entry})


def test_a_stream_that_is_none_is_refused() -> None:
    stored, entries = encode({"t": torch.randint(-9, 9, (1000, 8), dtype=torch.int8)})
    for stream in (stored["t"][:-9], torch.cat((stored["t"], stored["t"][:1]))):
        with pytest.raises(ArtifactError, match="does not hold just"):
            decode({"t": stream}, entries)
    with pytest.raises(ArtifactError, match="not a deflate stream"):
        decode({"t": torch.full_like(stored["t"], 255)}, entries)


def test_an_artifact_of_the_first_version_is_read(tmp_path: Path) -> None:
    model = Own().eval()
    with torch.no_grad():
        model.table.weight[:, :8] = 0
    path = save(model, tmp_path / "old")
    manifest = json.loads((path / "model.json").read_text())
    del manifest["sha256"]
    manifest["version"] = 1
    assert manifest["tensors"]["table.weight"].pop("group") == 4
    text = json.dumps(manifest | {"sha256": _own_hash(manifest)})
    (path / "model.json").write_text(text)
    same(model, load(path, Own()))


def test_pruned_quantised_bytes_follow_the_formula(tmp_path: Path) -> None:
    """What the canonical model's goal (<= 20 % of fp32) rests on, at a size that is quick."""
    torch.manual_seed(0)
    config = RankerConfig(
        n_items=20_000, n_categories=1000, history_length=12, d=64, ffn=128, tower=(256, 256)
    )
    model = Ranker(config)
    prune_(model, BlockPruning(sparsity=0.4, rounds=1))
    quantize_(model, Int8(), calibration=[(*inputs()[:4], *inputs()[4:])])
    path = save(model, tmp_path / "m")
    items, share = 20_000 * 64, 0.6
    table = items * share + items / 4 / 8 + 20_000 * 4  # kept bytes, one bit a group, row scales
    rest = (config.n_parameters() - items) * 1.15  # at most one byte a weight, and the small change
    manifest = (path / "model.json").stat().st_size
    assert artifact_bytes(path) <= table + rest + manifest
    assert artifact_bytes(path) < 0.25 * 4 * config.n_parameters()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(variant("pruned_quantized"), tmp_path_factory.mktemp("a") / "model")


def damaged(artifact: Path, tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / "copy"
    path.mkdir(exist_ok=True)
    for file in artifact.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_every_flipped_bit_and_truncation_is_found(
    artifact: Path, tmp_path: Path, name: str
) -> None:
    data = (artifact / name).read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, len(data), (40,), generator=generator).tolist():
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        with pytest.raises(ArtifactError):
            load(damaged(artifact, tmp_path, name, bytes(changed)))
    for size in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(ArtifactError):
            load(damaged(artifact, tmp_path, name, data[:size]))
    with pytest.raises(ArtifactError):
        load(damaged(artifact, tmp_path, name, data + b"x"))


def forged(artifact: Path, tmp_path: Path, change: Any) -> Path:
    """A manifest changed on purpose, with its checksum made good again."""
    manifest = json.loads((artifact / "model.json").read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = _own_hash(manifest)
    return damaged(artifact, tmp_path, "model.json", json.dumps(manifest).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=3), "version 3; this fastrec"),
        (lambda m: m.update(format="other"), "not a fastrec model"),
        (lambda m: m.update(model="os.system"), "unknown model class"),
        (lambda m: m["config"].update(n_items=-1), "bad config"),
        (lambda m: m["config"].update(n_items=77), "cannot become"),
        (lambda m: m["config"].update(history_length=9), "does not fit"),
        (lambda m: m["config"].update(surprise=1), "bad config"),
        (lambda m: m.update(tensors=[]), "'tensors' is missing"),
        (lambda m: m["tensors"].pop("tower.0.values"), "does not list"),
        (lambda m: m["tensors"].update(x=m["tensors"]["tower.0.bias"]), "'x' is missing"),
        (lambda m: m["tensors"]["tower.0.bias"].update(shape=[3]), "tower.0.bias"),
        (lambda m: m["tensors"]["tower.0.bias"].update(codec="zip"), "unknown codec"),
        (lambda m: m["tensors"]["tower.0.bias"].update(dtype="object"), "bad entry"),
        (lambda m: m["modules"]["tower.0"].update(out_features=9), "cannot become"),
        (lambda m: m["modules"]["tower.0"].update(type="Evil"), "cannot become"),
        (lambda m: m["modules"]["tower.0"].update(activation="tanh"), "activation"),
        (lambda m: m["modules"].update({"nowhere": {"type": "Identity"}}), "no module"),
        (lambda m: m["file"].update(name="../x.safetensors"), "tensor file"),
    ],
)
def test_forged_manifests_are_refused(
    artifact: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(forged(artifact, tmp_path, change))


def test_missing_and_extra_files(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="tensor file"):
        load(damaged(artifact, tmp_path, "more.safetensors", b""))
    (tmp_path / "copy" / "more.safetensors").unlink()
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="tensor file"):
        load(tmp_path / "copy")
    with pytest.raises(ArtifactError, match="not a fastrec model folder"):
        artifact_bytes(tmp_path)


def test_save_refuses_and_keeps_what_is_there(tmp_path: Path) -> None:
    model = ranker()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(ArgumentError, match="path"):
            save(model, tmp_path / name)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    save(model, tmp_path / "m", info={"n": 1})
    with pytest.raises(ArgumentError, match="info"):
        save(model, tmp_path / "m", info={"n": float("nan")})
    with pytest.raises(DtypeError, match="model"):
        save({"weights": 1}, tmp_path / "m")
    quantize_(model, QAT("prepare"))
    with pytest.raises(ArgumentError, match="convert"):
        save(model, tmp_path / "m")
    assert read_manifest(tmp_path / "m")["info"] == {"n": 1}
    assert issubclass(ArtifactError, FastrecError)


ODD = {
    "complex": torch.zeros(2, dtype=torch.complex64),
    "conjugate": torch.zeros(2, dtype=torch.complex64).conj(),
    "float8": torch.zeros(4, dtype=torch.float8_e4m3fn),
    "uint16": torch.zeros(4, dtype=torch.uint16),
    "sparse": torch.eye(4).to_sparse(),
    "meta": torch.zeros(4, device="meta"),
}


@pytest.mark.parametrize("kind", ODD)
def test_save_refuses_what_load_could_not_read(kind: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("odd", ODD[kind])
    with pytest.raises(ArgumentError, match=r"dense tensors of float64, .*, got 'odd': "):
        save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    buffers=st.lists(
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 40), max_size=3),
            st.sampled_from(["plain", "transposed", "expanded", "slice"]),
        ),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 9),
)
def test_whatever_save_takes_load_gives_back(
    buffers: list[Any], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def model(values: bool) -> nn.Module:
        made = nn.Module()
        for index, (dtype, shape, view) in enumerate(buffers):
            value = torch.randint(0, 2, shape, generator=generator).to(dtype)
            if view == "transposed" and len(shape) > 1:
                value = value.transpose(0, 1)
            elif view == "expanded":
                value = value.expand(3, *shape)
            elif view == "slice" and shape:
                value = value[shape[0] // 2 :]
            made.register_buffer(f"b{index}", value if values else torch.zeros_like(value))
        return made

    saved = model(True)
    path = save(saved, tmp_path_factory.mktemp("any") / "m")
    same(saved, load(path, model(False)))


def test_wrappers_leave_no_prefix(tmp_path: Path) -> None:
    plain = Own().eval()
    for number, wrap in enumerate((nn.DataParallel, lambda m: torch.compile(m, backend="eager"))):
        path = save(wrap(plain), tmp_path / str(number))
        same(plain, load(path, Own()))
        filled = Own()
        load(path, wrap(filled))
        same(plain, filled)
    assert read_manifest(path)["class"].endswith("Own")
    known = save(nn.DataParallel(ranker()), tmp_path / "ranker")
    same(ranker(), load(known))
