"""A server whose engine has a screen beside its file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc", reason="fastrec-kernels[serve] is not installed")

from serving_process import Running, engine_file, request_of

from fastrec.runtime import load_engine
from fastrec.runtime.screening import SUFFIX, fit
from fastrec.serving.client import Client
from fastrec.serving.core import SLO, ConfigError, Pool, Screening, ServingConfig
from fastrec.serving.core.screened import screened_source


@pytest.fixture(scope="module")
def path(tmp_path_factory: Any) -> Path:
    made = engine_file(tmp_path_factory.mktemp("screened") / "ranker.engine")
    with load_engine(made, threads=1) as engine:
        samples = [engine.spec.sample({"B": 16, "m": 20}, seed=s) for s in range(8)]
        fit(engine, samples, rank=8).save(f"{made}{SUFFIX}")
    return made


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_large_requests_are_screened_and_audited(path: Path, kind: str) -> None:
    config = ServingConfig(
        slo=SLO(60_000), pool=Pool(kind=kind), screening=Screening(keep=10, audit=1.0, audit_k=5)
    )
    server = Running(path, config)
    inputs = request_of(2, 60)

    async def ask() -> dict[str, np.ndarray]:
        async with Client([server.grpc]) as client:
            return await client.infer("ranker", inputs, timeout_s=60)

    try:
        scores = asyncio.run(ask())["scores"]
        with load_engine(path, threads=1) as engine:
            whole = engine(*inputs.values())
        first = np.argsort(-scores, axis=1)[:, :10]
        np.testing.assert_array_equal(
            np.take_along_axis(scores, first, 1), np.take_along_axis(whole, first, 1)
        )
        text = server.server.metrics.exposition("")[0].decode()
        assert "fastrec_screen_audits_total" in text
        assert "fastrec_screen_recall_ratio{" in text
    finally:
        server.close()


def test_only_files_with_a_screen_are_screened(path: Path, tmp_path: Path) -> None:
    on, off = Screening(keep=10), Screening()
    assert screened_source(path, off, None) == (path, 0)
    assert screened_source(tmp_path / "other", on, None) == (tmp_path / "other", 0)
    assert screened_source(dict, on, None) == (dict, 0)  # type: ignore[arg-type]
    entry, keep = screened_source(path, on, 2)
    assert keep == 10
    assert entry != path


@pytest.mark.parametrize("wrong", [{"keep": 7}, {"keep": 10, "audit_k": 11}, {"audit": 1.5}])
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"screening\."):
        Screening(**wrong)
