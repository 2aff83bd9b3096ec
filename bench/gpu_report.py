"""``make gpu-report``: builds, tests and times the GPU kernels and the whole ranker, with rivals.

Device time: CUDA events around replays of a graph that holds one call a set of inputs, as many sets
as overflow the L2 cache, ours and a rival's in turn. Host latency: wall clock of a call, apart.
Whatever is timed was right before. Ceilings are measured in the same run.

Every section is a process of its own with a share of the time: what crashes or hangs in one loses
neither its own earlier rows nor another's. The report is written after each. Without a GPU,
sections run once on small inputs (kernels in Triton's interpreter) and leave empty cells beside the
bounds that data sheets allow. It has never been run on a GPU by its authors.

Writes gpu_report.json and gpu_report.md, log.txt, tuned.json (tuned_tower.json where that was asked
for), and two plots where matplotlib is.
Needs torch, triton, numpy and pytest alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpu import SECTIONS, Section
from gpu.page import judged, markdown

HERE = Path(__file__)
ROOT = HERE.parents[1]
Row = dict[str, Any]
# Where a section writes; gone when it has ended.
ROWS = ".rows.jsonl"
PACKAGES = ("torch", "triton", "numpy", "cupy", "onnxruntime-gpu", "tensorrt")


def write(out: Path, report: Row) -> None:
    """gpu_report.json and gpu_report.md, whole at any time."""
    report["goals"] = judged(report["rows"])
    for name, text in (
        ("gpu_report.json", json.dumps(report, indent=1) + "\n"),
        ("gpu_report.md", markdown(report)),
    ):
        draft = out / f".{name}"
        draft.write_text(without_paths(text))
        draft.replace(out / name)


def without_paths(text: str) -> str:
    """Where this machine keeps the checkout and its Python is no part of a report."""
    places = (
        (sys.executable, "python"),
        (f"{ROOT}/", ""),
        (str(ROOT), "."),
        (sys.prefix, "python"),
    )
    for place, name in places:
        text = text.replace(place, name)
    return text


def run(section: Section, out: Path, seconds: float, gpu: bool, log: Path, cache: str) -> Row:
    """A section in a process of its own: its rows, how long it took, and why it ended early."""
    rows = out / ROWS
    rows.unlink(missing_ok=True)
    command = [sys.executable, str(HERE), "--out", str(out), "--seconds", f"{seconds:.1f}"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(HERE.parent)])}
    # What the tuning finds is for this report's other sections, not for this machine.
    env |= {"FASTREC_CACHE_DIR": cache}
    if not gpu:
        env["TRITON_INTERPRET"] = "1"
    start, why = time.monotonic(), None
    with log.open("a") as to:
        to.write(f"\n==== {section.name}\n")
        to.flush()
        process = subprocess.Popen(
            [*command, "--section", section.name],
            stdout=to,
            stderr=to,
            env=env,
            start_new_session=True,
        )
        try:
            # It stops by itself before; this is for what hangs.
            code = process.wait(seconds + 5)
            why = f"ended with status {code}" if code else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            why = "cut off: its share of the time was over"
    found = []
    if rows.exists():
        for line in rows.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # cut off while it wrote
                why = why or "its last row is broken"
        rows.unlink()
    return {
        "name": section.name,
        "seconds": time.monotonic() - start,
        "rows": found,
        **({"why": why} if why else {}),
    }


def versions() -> dict[str, str]:
    """Of Python and of what rivals need."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def report(out: Path, seconds: float, names: list[str] | None) -> int:
    """All sections that the time allows. 1 where a test failed or a section ended early."""
    end = time.monotonic() + seconds
    gpu = torch.cuda.is_available()
    data: Row = {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "versions": versions(),
        "sections": [],
        "rows": [],
    }
    write(out, data)
    log = out / "log.txt"
    log.write_text("")
    cache = tempfile.mkdtemp(prefix="fastrec-gpu-report-")
    for section in SECTIONS:
        chosen = section.name in names if names else not section.asked
        if not chosen or not (gpu or section.dry):
            continue
        # What others left over is what the last ones have.
        left = end - time.monotonic() - 8
        if left < 8:
            data["sections"].append(
                {"name": section.name, "seconds": 0.0, "why": "no time was left"}
            )
            continue
        # Chosen ones may take all the time, and so may a dry run's.
        most = left if names or not gpu else min(section.seconds, left)
        found = run(section, out, most, gpu, log, cache)
        data["rows"] += found.pop("rows")
        data["sections"].append(found)
        write(out, data)
    shutil.rmtree(cache, ignore_errors=True)
    if gpu and importlib.util.find_spec("matplotlib"):
        from gpu import pictures

        pictures.draw(data, out)
    log.write_text(without_paths(log.read_text(errors="replace")[-400_000:]))
    write(out, data)
    sys.stderr.write(markdown(data))
    tested = [row for row in data["rows"] if row.get("engine") == "pytest"]
    crashed = [s for s in data["sections"] if s.get("why", "").startswith("ended")]
    return int(any(row["failed"] or row["error"] for row in tested) or bool(crashed))


def main() -> None:
    """The report, or one section of it, in the process that it starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Folder for the report.")
    parser.add_argument("--seconds", type=float, default=525, help="Time for all of it.")
    parser.add_argument("--sections", nargs="*", help="Only these, with all the time for each.")
    parser.add_argument("--section", help="Run one, here, and write its rows alone.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.section is None:
        sys.exit(report(options.out, options.seconds, options.sections))
    from gpu.sheet import Sheet

    section = next(s for s in SECTIONS if s.name == options.section)
    gpu, rows = torch.cuda.is_available(), options.out / ROWS
    section.run(Sheet(rows, section.name, options.seconds, gpu=gpu, out=options.out))


if __name__ == "__main__":
    main()
