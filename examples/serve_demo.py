"""A server and a load on it: ``make serve-demo``.

The canonical ranker, 40 % pruned and INT8, with random weights; three tiers; the rate climbs to
three times what the server can do and comes back. Prints where the report is.

    python examples/serve_demo.py --out demo/serving
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

TIERS = {
    "gold": {"weight": 5.0},
    "silver": {"weight": 3.0},
    "bulk": {"weight": 2.0},
}


def make_engine(path: Path) -> None:
    """The engine's file; some seconds, once."""
    import torch

    import fastrec
    from fastrec.exporters.model_spec import spec_of
    from fastrec.models import Ranker, RankerConfig

    torch.manual_seed(0)
    model = Ranker(RankerConfig.taobao()).eval()
    spec = spec_of(model, ())
    fastrec.prune_(model, fastrec.BlockPruning(sparsity=0.4, block=(32, 4), rounds=1))
    calibration = [tuple(map(torch.from_numpy, spec.sample({"B": 4}, seed=s))) for s in range(4)]
    fastrec.quantize_(model, fastrec.Int8(), calibration=calibration)
    with fastrec.compile(
        model, spec.sample({"m": 50}), "native", threads=1, settings={"executor": "plan"}
    ) as engine:
        engine.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/serving"))
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    engine = args.out / "ranker.fastrec"
    if not engine.exists():
        print("making the engine: the canonical ranker, 40 % pruned, INT8 ...", flush=True)
        make_engine(engine)
    config, ready = args.out / "server.json", args.out / "ready.json"
    config.write_text(json.dumps({"tiers": TIERS}) + "\n")
    ready.unlink(missing_ok=True)
    fastrec_command = [sys.executable, "-c", "from fastrec.cli import main; main()"]
    server = subprocess.Popen(
        [*fastrec_command, "serve", str(engine), "--config", str(config), "--grpc-port", "0",
         "--http-port", "0", "--ready-file", str(ready)]
    )  # fmt: skip
    try:
        while not (ready.exists() and ready.read_text()):
            if server.poll() is not None:
                sys.exit(f"the server ended with status {server.returncode}")
            time.sleep(0.05)
        ports = json.loads(ready.read_text())
        load = [
            *fastrec_command,
            "loadtest",
            f"127.0.0.1:{ports['grpc_port']}",
            "--model",
            "ranker",
        ]
        load += ["--tiers", "gold:0.2,silver:0.4,bulk:0.4"]
        found = args.out / "capacity.json"
        print("looking for the highest rate that keeps 99 % in time ...", flush=True)
        search = [*load, "--capacity", "--rate", "100", "--seconds", "2", "--json", str(found)]
        subprocess.run(search, check=True, stdout=subprocess.DEVNULL)
        c = json.loads(found.read_text())["capacity_rps"] or 50.0
        step = args.seconds / 6
        shares = (0.5, 0.9, 2.0, 3.0, 0.9, 0.5)
        profile = ",".join(f"{share * c:.1f}:{step:g}" for share in shares)
        print(f"status page: http://127.0.0.1:{ports['http_port']}/", flush=True)
        subprocess.run([*load, "--profile", profile, "--out", str(args.out)], check=True)
    finally:
        server.terminate()
        server.wait()
    report = args.out / "loadtest.html"
    # Where there is no browser to open it, the path is what remains.
    webbrowser.open(report.resolve().as_uri())
    print(f"report: {report}")


if __name__ == "__main__":
    main()
