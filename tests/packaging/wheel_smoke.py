"""Asks an installed wheel for what a user relies on; run by the Python it is installed in.

    python -I tests/packaging/wheel_smoke.py FOLDER [--serve]

``FOLDER`` is what ``small_engine.py`` wrote. Needs nothing but the wheel and what it requires;
``--serve`` needs its extra ``serve``.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

import fastrec
from fastrec.runtime import load_engine

COMMAND = str(Path(sys.executable).with_name("fastrec"))


def installed() -> None:
    """It is the wheel that is imported, and it is complete without torch."""
    here = Path(fastrec.__file__).resolve()
    packages = Path(sysconfig.get_path("platlib")).resolve()
    assert packages in here.parents, f"{here} is not of the environment {packages}"
    assert importlib.util.find_spec("torch") is None, "torch is installed: this proves nothing"
    for name in ("py.typed", "serving/wire/protos/schema.binpb", "serving/observe/page.html"):
        assert (here.parent / name).is_file(), f"{name} is not in the wheel"


def info() -> None:
    """The compiled part loads, and the report says which instruction set runs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "info.json"
        subprocess.run([COMMAND, "info", "--json", str(file)], check=True, capture_output=True)
        told = json.loads(file.read_text())
    assert told["compiled"] == {"available": True, "why": None}, told["compiled"]
    assert told["isa"]["active"] in told["isa"]["known"]


def scores(folder: Path) -> None:
    """An engine that another Python saved gives the scores that it gave there."""
    engine = load_engine(folder / "ranker.engine")
    got = engine(*np.load(folder / "request.npz").values())
    close(got, folder)


def serve(folder: Path) -> None:
    """``fastrec serve`` comes up, answers over HTTP, and ends at SIGTERM."""
    with tempfile.TemporaryDirectory() as made:
        ready = Path(made) / "ports.json"
        process = subprocess.Popen(
            [COMMAND, "serve", str(folder / "ranker.engine"), "--grpc-port", "0",
             "--http-port", "0", "--ready-file", str(ready), "--slo-ms", "5000"],
        )  # fmt: skip
        try:
            end = time.monotonic() + 60
            while not ready.exists() or not ready.read_text().endswith("\n"):
                assert process.poll() is None, "the server ended early"
                assert time.monotonic() < end, "the server did not come up within a minute"
                time.sleep(0.05)
            port = json.loads(ready.read_text())["http_port"]
            tensors = [
                {"name": n, "datatype": "INT64", "shape": list(a.shape), "data": a.tolist()}
                for n, a in np.load(folder / "request.npz").items()
            ]
            call = urllib.request.Request(
                f"http://127.0.0.1:{port}/v2/models/ranker/infer",
                json.dumps({"inputs": tensors}).encode(),
            )
            with urllib.request.urlopen(call, timeout=10) as reply:
                output = json.load(reply)["outputs"][0]
            close(np.array(output["data"], np.float32).reshape(output["shape"]), folder)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(30)
        assert code == 0, f"the server ended with {code}"


def close(got: np.ndarray, folder: Path) -> None:
    """Other instruction sets add in another order: the last digits may differ, no more."""
    expected = np.load(folder / "scores.npy")
    assert got.shape == expected.shape, (got.shape, expected.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    installed()
    info()
    scores(where)
    if "--serve" in sys.argv[2:]:
        serve(where)
