"""Memory of a process, and of a child process that reports on itself as JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrec.errors import BackendError


def memory_mb() -> dict[str, float]:
    """VmRSS (now) and VmHWM (high-water mark) of this process in MB.

    Raises:
        BackendError: there is no /proc/self/status (not Linux).
    """
    try:
        text = Path("/proc/self/status").read_text()
    except OSError as error:
        raise BackendError("memory can only be read on Linux (/proc/self/status)") from error
    pairs = (
        line.split(":", 1) for line in text.splitlines() if line.startswith(("VmRSS", "VmHWM"))
    )
    return {key: int(value.split()[0]) * 1024 / 1e6 for key, value in pairs}


def run_child(command: Sequence[str], *, timeout_s: float = 300) -> dict[str, Any]:
    """Run a child process that prints one JSON object as its last line, and return that object.

    Raises:
        BackendError: the child failed, ran past ``timeout_s``, or printed no JSON object.
    """
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"child process ran past {timeout_s:g} s: {command[0]}") from error
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    try:
        answer = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        answer = None
    if isinstance(answer, dict) and "error" in answer:
        raise BackendError(f"child process failed: {answer['error']}")
    if done.returncode or not isinstance(answer, dict):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"child process failed with status {done.returncode}: {last}")
    return answer


def peak_rss_mb(command: Sequence[str], *, timeout_s: float = 300) -> float:
    """Peak resident memory in MB (10^6 bytes) of a ``python -m fastrec.runtime.child`` command.

    The child reads its own high-water mark: the parent's ``ru_maxrss`` of a child starts at the
    parent's own size on Linux, because it survives exec.

    Raises:
        BackendError: as :func:`run_child`.
    """
    answer = run_child(command, timeout_s=timeout_s)
    if not isinstance(answer.get("peak_rss_mb"), int | float):
        raise BackendError("child process reported no peak_rss_mb")
    return float(answer["peak_rss_mb"])
