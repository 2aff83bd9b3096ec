"""A server in a thread of the test's process, and models to serve."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import torch

import fastrec
from fastrec.exporters.model_spec import spec_of
from fastrec.models import Ranker, RankerConfig
from fastrec.serving.server import Server, ServerOptions, ServingConfig

CONFIG = RankerConfig(
    n_items=300, n_categories=20, history_length=12, d=16, category_dim=8, n_blocks=1, n_heads=2,
    ffn=32, tower=(32, 32),
)  # fmt: skip


def ranker(seed: int = 0) -> Ranker:
    torch.manual_seed(seed)
    return Ranker(CONFIG).eval()


def engine_file(path: Path, seed: int = 0) -> Path:
    """A native engine of a small ranker."""
    model = ranker(seed)
    examples = spec_of(model, ()).sample({"m": 5})
    engine = fastrec.compile(model, examples, "native", threads=1, settings={"executor": "plan"})
    return engine.save(path)


def request_of(users: int = 2, candidates: int = 5, seed: int = 0) -> dict[str, Any]:
    spec = spec_of(ranker(), ())
    drawn = spec.sample({"B": users, "m": candidates}, seed=seed)
    return dict(zip(spec.names, drawn, strict=True))


class Running:
    """A server that serves until ``close``."""

    def __init__(
        self, path: Path | None, config: ServingConfig | None = None, **options: Any
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        options = {"grpc_port": 0, "http_port": 0, "drain_s": 5.0, **options}
        self.server = Server(path, config, ServerOptions(**options))
        try:
            self.run(self.server.start())
        except BaseException:
            self.close()
            raise
        self.grpc = f"127.0.0.1:{self.server.grpc_port}"
        self.http = f"127.0.0.1:{self.server.http_port}"

    def run(self, work: Awaitable[Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(240)  # type: ignore[arg-type]

    def close(self) -> None:
        try:
            self.run(self.server.stop())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(10)
            self.loop.close()
