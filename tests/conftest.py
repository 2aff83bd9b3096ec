"""What every test may rely on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the user's cache, or left in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTREC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
