"""Progress bar of a training run, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastrec.terminal import stderr


class TrainingProgress:
    """Steps done, epoch, smoothed loss, the last validation; silent when not ``enabled``."""

    def __init__(self, total: int, done: int, *, enabled: bool) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=stderr(),
            disable=not enabled,
        )
        self._task = self._progress.add_task("training", total=total, completed=done, note="")
        self._smooth: float | None = None
        self._valid = ""

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, done: int, loss: float, epoch: int) -> None:
        """One step has been taken."""
        self._smooth = loss if self._smooth is None else 0.98 * self._smooth + 0.02 * loss
        note = f"epoch {epoch + 1}  loss {self._smooth:.4f}{self._valid}"
        self._progress.update(self._task, completed=done, note=note)

    def epoch(self, row: dict[str, Any]) -> None:
        """One epoch has been validated."""
        shown = [name for name in ("hit_rate_10", "ndcg_10") if name in row]
        self._valid = "".join(f"  {name} {row[name]:.4f}" for name in shown)
