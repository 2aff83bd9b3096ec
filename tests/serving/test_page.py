"""The status page in a real browser."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from serving_process import request_of

grpcclient = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


def test_the_page_shows_load_in_a_browser(running, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    tensors = []
    for name, array in request_of().items():
        tensor = grpcclient.InferInput(name, list(array.shape), "INT64")
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    with grpcclient.InferenceServerClient(running.grpc) as client:
        client.infer("ranker", tensors)
    page = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000"),
            f"http://{running.http}/",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert '<span id="state" role="status" class="good">ready</span>' in page
    assert ">ranker</td>" in page
    assert ">default</td>" in page  # the tier
    assert page.count("<rect") == 120  # a minute, answered and refused
