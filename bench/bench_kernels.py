"""Every op against the machine's limits and its rivals: kernels.json, kernels.md and PNG files.

``python bench/bench_kernels.py --out DIR``. Each engine is checked before it is timed, rounds are
interleaved in one process, ratios carry 95 % intervals, and the goals are judged on the rows of the
same run. Rows are kept in ``DIR/kernels.rows.jsonl`` as they come; ``--resume`` goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import goals
import plots
import rivals
from fastrec import kernels
from fastrec.measure.ceilings import Ceilings
from fastrec.measure.machine import machine_card
from measuring import OURS, QUICK, Settings, cases, measure
from tables import markdown

# Seconds of each measurement of a ceiling.
CEILING_S, QUICK_CEILING_S = 0.1, 0.01


class Journal:
    """The rows so far, one case a line, so that an interrupted run can go on."""

    def __init__(self, path: Path, head: dict[str, Any], resume: bool) -> None:
        self.path, self.done = path, {}
        if resume and path.exists():
            first, *lines = path.read_text().splitlines() or ["{}"]
            if json.loads(first) != head:
                raise typer.BadParameter(f"{path} is of another machine or other settings")
            for line in lines:
                # A line cut off by the interruption is measured again.
                with_key = _parsed(line)
                if with_key is not None:
                    self.done[with_key["key"]] = with_key["rows"]
        text = [json.dumps(head), *(self._line(*item) for item in self.done.items())]
        path.write_text("\n".join(text) + "\n")

    def add(self, key: str, rows: list[dict[str, Any]]) -> None:
        self.done[key] = rows
        with self.path.open("a") as file:
            file.write(self._line(key, rows) + "\n")

    @staticmethod
    def _line(key: str, rows: list[dict[str, Any]]) -> str:
        return json.dumps({"key": key, "rows": rows})


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except json.JSONDecodeError:
        return None


def main(
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    ops: Annotated[str | None, typer.Option(help="Op ids, comma-separated; default: all.")] = None,
    threads: Annotated[str | None, typer.Option(help="Such as 1,2; default: 1 and all.")] = None,
    quick: Annotated[bool, typer.Option(help="Each op's smallest sample, few rounds.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on after an interruption.")] = False,
) -> None:
    """Measure every op of the registry."""
    counts = [int(x) for x in threads.split(",")] if threads else sorted({1, kernels.num_threads()})
    wanted = ops.split(",") if ops else None
    if unknown := set(wanted or ()) - set(kernels.OP_IDS):
        raise typer.BadParameter(f"unknown ops {sorted(unknown)}; there are {kernels.OP_IDS}")
    settings = QUICK if quick else Settings()
    rivals.COMPILE = not quick
    out.mkdir(parents=True, exist_ok=True)
    machine = machine_card()
    head = {"cpu": machine["cpu"], "settings": dataclasses.asdict(settings), "quick": quick}
    journal = Journal(out / "kernels.rows.jsonl", head, resume)
    resumed = len(journal.done)
    seconds = QUICK_CEILING_S if quick else CEILING_S
    ceilings = {count: Ceilings(count, seconds) for count in counts}
    took: dict[str, float] = {}
    work = list(cases(wanted, counts, quick))
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("kernels", total=len(work))
        for case in work:
            if case.key not in journal.done:
                progress.update(task, description=case.key)
                start = time.perf_counter()
                rows = measure(case, ceilings[case.threads], settings)
                took[case.key] = time.perf_counter() - start
                journal.add(case.key, rows)
            progress.advance(task)
    rows = [row for case in work for row in journal.done[case.key]]
    report = {
        "machine": machine,
        "settings": head["settings"] | {"quick": quick, "cases_resumed": resumed},
        "seconds": {key: round(seconds, 2) for key, seconds in took.items()},
        "ceilings": {
            count: {"peaks": found.peaks, "levels": found.levels}
            for count, found in ceilings.items()
        },
        "goals": [goal.judge(rows) for goal in goals.declared(counts)],
        "rows": rows,
    }
    (out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (out / "kernels.md").write_text(text)
    plots.draw(report, out)
    journal.path.unlink()
    Console().print(text.split("## Roofline")[0], markup=False)
    lost = [r for r in rows if r["why_not_timed"]]
    for row in lost:
        where = f"{row['op']} {row['case']} {row['threads']}T {row['engine']}"
        Console(stderr=True).print(f"{where}: {row['why_not_timed']}", markup=False)
    if any(row["engine"] == OURS for row in lost):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
