"""Rows a second and memory of ``prepare`` on one log in several layouts: data.md, data.json.

``python bench/bench_data.py --out DIR``. A generated log of Taobao's shape is written once and
rewritten in each layout; each layout is read, found by looking, in a process of its own, the rounds
interleaved. On a busy machine the CPU seconds say more than the rate.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import polars as pl
import typer

from fastrec.data import generate, prepare
from fastrec.measure.machine import machine_card
from fastrec.measure.memory import memory_mb, run_child

COLUMNS = ["user", "item", "category", "behaviour", "time"]
CHUNK = 1 << 24


def layouts(log: Path, folder: Path) -> dict[str, Path]:
    """The log in each layout."""
    frame = pl.read_csv(log, has_header=False, new_columns=COLUMNS)
    paths = {"csv, no header": log}

    def csv(name: str, change: Callable[[pl.DataFrame], pl.DataFrame], **options: Any) -> None:
        paths[name] = folder / f"{len(paths)}.csv"
        change(frame).write_csv(paths[name], **options)

    seconds = pl.from_epoch("time", time_unit="s")
    csv("csv, header, milliseconds", lambda f: f.with_columns(pl.col("time") * 1000))
    csv(
        "csv, header, ISO times", lambda f: f.with_columns(seconds.dt.strftime("%Y-%m-%d %H:%M:%S"))
    )
    csv("csv, quoted", lambda f: f, quote_style="always")
    text = pl.format("A{}XQ", "user"), pl.format("B00{}", "item")
    csv("csv, text ids", lambda f: f.with_columns(user=text[0], item=text[1]))
    csv(
        "user item rating time, tsv",
        lambda f: f.select("user", "item", pl.lit(5), "time"),
        separator="\t",
    )
    paths["user::item::rating::time"] = folder / "ratings.dat"
    data = paths["user item rating time, tsv"].read_bytes().partition(b"\n")[2]
    paths["user::item::rating::time"].write_bytes(data.replace(b"\t", b"::"))
    csv("user item", lambda f: f.select("user", "item"), separator=" ", include_header=False)
    paths["parquet"] = folder / "log.parquet"
    frame.write_parquet(paths["parquet"])
    paths["JSON lines"] = folder / "log.json"
    frame.write_ndjson(paths["JSON lines"])
    paths["csv.gz"] = folder / "log.csv.gz"
    with log.open("rb") as source, gzip.open(paths["csv.gz"], "wb", compresslevel=1) as packed:
        while chunk := source.read(CHUNK):
            packed.write(chunk)
    paths["csv, one bad line in 100,000"] = folder / "bad.csv"
    lines = log.read_bytes().split(b"\n")
    lines[50_000::100_000] = [b"1,2,3"] * len(lines[50_000::100_000])
    paths["csv, one bad line in 100,000"].write_bytes(b"\n".join(lines))
    return paths


def read_once(path: Path) -> dict[str, Any]:
    """``prepare`` in this process: rows a second, CPU seconds, peak memory."""
    with TemporaryDirectory(dir=path.parent) as folder:
        begun = time.process_time()
        report = prepare(path, Path(folder) / "out")
        return {
            "rows": report.rows,
            "kept": report.kept,
            "seconds": report.seconds,
            "cpu_seconds": time.process_time() - begun,
            "peak_mb": memory_mb()["VmHWM"],
            "read_as": report.read_as,
        }


def main(
    out: Annotated[Path, typer.Option(help="Folder for data.md and data.json.")] = Path("."),
    users: Annotated[int, typer.Option(help="Users of the log, about 103 events each.")] = 30_000,
    rounds: Annotated[int, typer.Option(help="Times each layout is read.")] = 3,
    child: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if child is not None:
        print(json.dumps(read_once(child)))
        return
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        generate(log, preset="taobao", n_users=users, n_items=200_000)
        paths = layouts(log, Path(folder))
        # Memory must not grow with the rows: the same log four times over, other users each time.
        paths["csv, no header, four times the rows"] = Path(folder) / "long.csv"
        frame = pl.read_csv(log, has_header=False, new_columns=COLUMNS)
        with paths["csv, no header, four times the rows"].open("wb") as file:
            for copy in range(4):
                moved = frame.with_columns(pl.col("user") + copy * users)
                moved.write_csv(file, include_header=False)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
        for _ in range(rounds):
            for name, path in paths.items():
                command = [sys.executable, __file__, "--child", str(path)]
                found[name].append(run_child(command))
    rows = []
    for name, runs in found.items():
        best = min(runs, key=lambda run: run["seconds"])
        rate, cpu = best["rows"] / best["seconds"], min(run["cpu_seconds"] for run in runs)
        peak = max(run["peak_mb"] for run in runs)
        rows.append(
            f"| {name} | {best['rows']:,} | {rate / 1e6:.2f} M | {cpu / best['rows'] * 1e6:.2f} "
            f"| {peak:.0f} |"
        )
    out.mkdir(parents=True, exist_ok=True)
    card = machine_card()
    values = {"machine": card, "users": users, "rounds": rounds, "layouts": found}
    (out / "data.json").write_text(json.dumps(values, indent=1) + "\n")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    text = f"""# Logs in every layout

{card["cpu"]}, {card["cores_usable"]} cores; commit {card["commit"]}; polars {pl.__version__}; load
average at the end {load}. `prepare`, the layout found by looking, on one log of {users:,} users
(`fastrec data generate --preset taobao --users {users} --items 200000`) written in each layout;
best of {rounds} interleaved rounds.

    python bench/bench_data.py --users {users} --rounds {rounds} --out DIR

| layout | rows | rows/s | CPU us a row | peak RSS, MB |
|---|---|---|---|---|
"""
    (out / "data.md").write_text(text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    typer.run(main)
