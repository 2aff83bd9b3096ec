"""One server for a module, and one of a test's own."""

from __future__ import annotations

import pytest

pytest.importorskip("grpc", reason="fastrec-kernels[serve] is not installed")

from serving_process import Running, engine_file


@pytest.fixture(scope="session")
def engine_path(tmp_path_factory):
    """A native engine's file."""
    return engine_file(tmp_path_factory.mktemp("engines") / "ranker.engine")


@pytest.fixture(scope="session")
def other_path(tmp_path_factory):
    """Another one, with other scores."""
    return engine_file(tmp_path_factory.mktemp("engines") / "other.engine", seed=1)


@pytest.fixture(scope="module")
def running(engine_path):
    """A server of that file."""
    made = Running(engine_path)
    yield made
    made.close()


@pytest.fixture
def start():
    """``Running``, closed at the end of the test."""
    made = []

    def begin(*args, **options):
        made.append(Running(*args, **options))
        return made[-1]

    yield begin
    for server in made:
        server.close()
