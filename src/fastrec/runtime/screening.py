"""Fewer candidates for the deep tower: a dot product decides which are worth it.

A native engine splits into ``encode`` (the history, once a user) and ``score`` (each candidate).
The screen stands between them: it turns the encoded state into one vector, and a candidate's cheap
score is that vector's dot product with the candidate's rows of the engine's own tables. The best
``keep`` of them are scored in full; the others come behind, in the order of their cheap scores.

    state  -> u: mean over the history's valid positions, and its newest one     [B, U]
    q      = (u - mean) A + c                                                    [B, D]
    cheap  = sum over tables of table[candidate] . q's part for that table       [B, m]

``A`` (of low rank) and ``c`` are fitted by ridge regression so that ``cheap`` follows the engine's
own scores, which are centred a user: only their order matters. numpy alone; no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fastrec.errors import ArgumentError, ArtifactError, BackendError
from fastrec.runtime.native.engine import PlanEngine
from fastrec.runtime.native.user_state import candidate_positions

Arrays = tuple[np.ndarray, ...]
# An engine's screen lies beside its file, under the file's name and this.
SUFFIX = ".screen.npz"
_FORMAT = "fastrec-screen-1"
# What examine() of the serving room and other small calls ask for stays exact.
LEAST_KEPT = 8


@dataclass(frozen=True, eq=False)
class Screen:
    """A fitted screen.

    Args:
        mean: [U], of the users' vectors.
        into: [U, D], ``A``.
        constant: [D], ``c``.
        tables: (candidate input, rows, width) of each table, in the order of D.
        report: what :meth:`recall` said of requests that it was not fitted on.
    """

    mean: np.ndarray
    into: np.ndarray
    constant: np.ndarray
    tables: tuple[tuple[int, int, int], ...]
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """As one ``.npz`` without pickled objects."""
        header = {"format": _FORMAT, "tables": self.tables, "report": self.report}
        with Path(path).open("wb") as file:
            np.savez(
                file,
                mean=self.mean,
                into=self.into,
                constant=self.constant,
                header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            )

    @classmethod
    def load(cls, path: str | Path) -> Screen:
        """The screen that :meth:`save` wrote.

        Raises:
            ArtifactError: it is no screen.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as held:
                header = json.loads(held["header"].tobytes())
                mean, into, constant = held["mean"], held["into"], held["constant"]
            tables = tuple((int(i), int(n), int(w)) for i, n, w in header["tables"])
            width = sum(w for _, _, w in tables)
            sizes = (mean.shape, into.shape, constant.shape)
            if header["format"] != _FORMAT or sizes != (
                (len(mean),), (len(mean), width), (width,)
            ):  # fmt: skip
                raise ValueError(f"sizes {sizes} for tables {tables}")
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise ArtifactError(f"{path}: not a screen ({error})") from error
        return cls(mean, into, constant, tables, header["report"])


class _Table:
    """A candidate input's table in the engine's program."""

    def __init__(self, position: int, table: np.ndarray, scale: np.ndarray | None) -> None:
        self.position, self.values, self.scale = position, table, scale

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """[..., width] float32."""
        rows = self.values[ids].astype(np.float32)
        return rows if self.scale is None else rows * self.scale[ids][..., None]

    def products(self, ids: np.ndarray, query: np.ndarray) -> np.ndarray:
        """[B, m]: rows of ``ids`` [B, m] times ``query`` [B, width]."""
        dots = np.matmul(self.values[ids].astype(np.float32), query[:, :, None])[..., 0]
        return dots if self.scale is None else dots * self.scale[ids]


class Screened:
    """An engine behind a screen; called as the engine is, with the same outputs.

    Args:
        engine: a native one that splits.
        screen: fitted for it.
        keep: candidates of a user that are scored in full; requests of no more are not touched.
        audit: share of the screened calls that are also scored whole, to measure recall; such a
            call takes as long as without the screen.
        audit_k: how many of the best candidates recall is about.

    Attributes:
        recall: of the last call, where it was audited: the share of the whole engine's best
            ``audit_k`` candidates that the screen kept. Else None.

    Raises:
        ArgumentError: ``keep`` or ``audit`` out of range, or an engine that ``screen`` is not for.
        BackendError: the engine does not split.
    """

    def __init__(
        self, engine: Any, screen: Screen, keep: int, *, audit: float = 0.0, audit_k: int = 10
    ) -> None:
        if keep < LEAST_KEPT:
            raise ArgumentError("keep", f"at least {LEAST_KEPT}", keep)
        if not 0 <= audit <= 1:
            raise ArgumentError("audit", "a share in 0..1", audit)
        if not 1 <= audit_k <= keep:
            raise ArgumentError("audit_k", f"1..keep = {keep}", audit_k)
        self.engine, self.screen, self.keep = engine, screen, keep
        self.audit, self.audit_k = audit, audit_k
        self.recall: float | None = None
        self._owed = 0.0
        self._parts = _Parts(engine)
        if self._parts.layout != screen.tables:
            raise ArgumentError(
                "screen", f"one for tables {self._parts.layout}", f"one for {screen.tables}"
            )

    @property
    def spec(self) -> Any:
        """The engine's."""
        return self.engine.spec

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """[B, m] scores; those of candidates that were not kept lie below all that were.

        Raises:
            FastrecError: as the engine raises it.
        """
        self.recall = None
        parts = self._parts
        candidates = [inputs[i] for i in parts.candidates] if len(inputs) > parts.last else []
        if not candidates or candidates[0].ndim != 2 or candidates[0].shape[1] <= self.keep:
            scores: np.ndarray = self.engine(*inputs)
            return scores
        # The engine checks what it is given, and is not given all candidates.
        inputs = tuple(self.engine.spec.check(inputs)[0])
        candidates = [inputs[i] for i in parts.candidates]
        state = self.engine.encode(*(inputs[i] for i in parts.history))
        cheap = self.cheap(state, inputs)
        kept = np.argpartition(cheap, -self.keep, axis=1)[:, -self.keep :]
        deep = self.engine.score(state, *(np.take_along_axis(c, kept, 1) for c in candidates))
        # Below the lowest score that was computed, in the order of the cheap ones.
        below = cheap - cheap.max(axis=1, keepdims=True) + deep.min(axis=1, keepdims=True) - 1
        np.put_along_axis(below, kept, deep, 1)
        self._owed += self.audit
        if self._owed >= 1:
            self._owed -= 1
            self.recall = _recall(self.engine.score(state, *candidates), kept, self.audit_k)
        return below.astype(deep.dtype, copy=False)

    def cheap(self, state: Any, inputs: Arrays) -> np.ndarray:
        """[B, m] cheap scores of checked inputs."""
        screen, parts = self.screen, self._parts
        query = (parts.user(state, inputs) - screen.mean) @ screen.into + screen.constant
        total, start = None, 0
        for table, (_, _, width) in zip(parts.tables, screen.tables, strict=True):
            part = table.products(inputs[table.position], query[:, start : start + width])
            total = part if total is None else total + part
            start += width
        assert total is not None
        return total

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


class _Parts:
    """Where the engine's plan keeps what the screen reads."""

    def __init__(self, engine: Any) -> None:
        if not isinstance(engine, PlanEngine):
            raise BackendError("screening needs a native engine that runs one plan")
        spec = engine.spec
        self.engine, self.spec = engine, spec
        self.candidates = candidate_positions(spec)
        self.history = tuple(i for i in range(len(spec.fields)) if i not in self.candidates)
        self.last = max(*self.candidates, *self.history)
        if any(len(spec.fields[i].dims) != 2 for i in self.candidates):
            raise BackendError("screening needs candidates of [B, m] ids")
        self.tables = [
            _Table(position, table, scale)
            for position, table, scale in engine.lookups()
            if position in self.candidates
        ]
        if not self.tables:
            raise BackendError("this plan looks no candidate up in a table")
        self.layout = tuple((t.position, *t.values.shape) for t in self.tables)
        # A length of each history, where there is one: positions beyond it are padding.
        self._lengths = next(
            (i for i, f in enumerate(spec.fields) if f.dims == ("B",) and isinstance(f.rows, str)),
            None,
        )

    def user(self, state: Any, inputs: Arrays) -> np.ndarray:
        """[B, U] float32: what the state says of each user."""
        users = inputs[self.candidates[0]].shape[0]
        vectors = []
        for array in state.arrays:
            if array.dtype != np.float32 or array.shape[:1] != (users,) or array.ndim < 2:
                continue
            if array.ndim == 2:
                vectors.append(array)
                continue
            flat = array.reshape(users, array.shape[1], -1)
            length = self._length(inputs, flat.shape[1])
            valid = np.arange(flat.shape[1]) < length[:, None]
            mean = np.matmul(valid[:, None].astype(np.float32), flat)[:, 0] / length[:, None]
            vectors += [mean, flat[np.arange(users), length - 1]]
        if not vectors:
            raise BackendError("the encoded state holds no vector of a user")
        return np.concatenate(vectors, axis=1).astype(np.float32, copy=False)

    def _length(self, inputs: Arrays, longest: int) -> np.ndarray:
        if self._lengths is None:
            return np.full(len(inputs[self.candidates[0]]), longest)
        return np.clip(inputs[self._lengths], 1, longest)

    def vectors(self, inputs: Arrays) -> np.ndarray:
        """[B, m, D] float32: the candidates' rows of all tables."""
        return np.concatenate([t.vectors(inputs[t.position]) for t in self.tables], axis=2)


def fit(
    engine: Any,
    requests: Iterable[Sequence[np.ndarray]],
    *,
    rank: int = 24,
    ridge: float = 1e-3,
) -> Screen:
    """A screen for a native engine.

    Args:
        requests: inputs of calls as they come in serving, of a few thousand users in all with tens
            of candidates each; the engine scores them here.
        rank: directions of users, and of candidates, that the fit tells apart.
        ridge: pull towards zero, in units of a feature's variance.

    Raises:
        ArgumentError: no requests, or too few for the rank.
        BackendError: the engine does not split, or has no tables.
    """
    parts = _Parts(engine)
    users, items, scores = [], [], []
    for given in requests:
        inputs = tuple(engine.spec.check(given)[0])
        state = engine.encode(*(inputs[i] for i in parts.history))
        users.append(parts.user(state, inputs))
        items.append(parts.vectors(inputs))
        scores.append(engine.score(state, *(inputs[i] for i in parts.candidates)))
    if len(np.concatenate(users) if users else ()) < 2 * rank:
        raise ArgumentError("requests", f"at least {2 * rank} users", sum(map(len, users)))
    all_users = np.concatenate(users).astype(np.float64)
    mean = all_users.mean(axis=0)
    to_users = _directions([all_users - mean], rank)
    to_items = _directions([e.reshape(-1, e.shape[2]).astype(np.float64) for e in items], rank)
    size = to_items.shape[1] * (to_users.shape[1] + 1)
    gram, right = np.zeros((size, size)), np.zeros(size)
    for u, e, s in zip(users, items, scores, strict=True):
        # A user's own level says nothing of the order of candidates: all is centred a user.
        cand = (e - e.mean(axis=1, keepdims=True)) @ to_items  # [B, m, r]
        who = np.concatenate([np.ones((len(u), 1)), (u - mean) @ to_users], axis=1)  # [B, r + 1]
        x = (who[:, None, :, None] * cand[:, :, None, :]).reshape(-1, size)
        y = (s - s.mean(axis=1, keepdims=True)).astype(np.float64).reshape(-1)
        gram += x.T @ x
        right += x.T @ y
    gram[np.diag_indices(size)] += ridge * gram.trace() / size + 1e-12
    solved = np.linalg.solve(gram, right).reshape(to_users.shape[1] + 1, -1)
    return Screen(
        mean.astype(np.float32),
        (to_users @ solved[1:] @ to_items.T).astype(np.float32),
        (solved[0] @ to_items.T).astype(np.float32),
        parts.layout,
    )


def recall(
    engine: Any, screen: Screen, requests: Iterable[Sequence[np.ndarray]], keep: int, k: int = 10
) -> dict[str, float]:
    """How much of the engine's own best ``k`` candidates survives the screen.

    Args:
        requests: inputs of calls with more than ``keep`` candidates, others than it was fitted on.

    Returns:
        ``recall`` (a share of k), ``all_kept`` (share of users whose best k all survive),
        ``chance`` (a screen that draws lots), ``users``, ``keep``, ``k``, ``candidates``.

    Raises:
        ArgumentError: no requests, or one with too few candidates.
    """
    screened = Screened(engine, screen, keep, audit=1.0, audit_k=k)
    found, complete, users, width = 0.0, 0, 0, 0
    for given in requests:
        inputs = tuple(engine.spec.check(given)[0])
        width = inputs[screened._parts.candidates[0]].shape[1]
        if width <= keep:
            raise ArgumentError("requests", f"more than keep = {keep} candidates", width)
        state = engine.encode(*(inputs[i] for i in screened._parts.history))
        kept = np.argpartition(screened.cheap(state, inputs), -keep, axis=1)[:, -keep:]
        deep = engine.score(state, *(inputs[i] for i in screened._parts.candidates))
        hits = _hits(deep, kept, k)
        found += float(hits.sum())
        complete += int((hits == k).sum())
        users += len(hits)
    if not users:
        raise ArgumentError("requests", "at least one", "none")
    return {
        "recall": found / users / k,
        "all_kept": complete / users,
        "chance": keep / width,
        "users": users,
        "keep": keep,
        "k": k,
        "candidates": width,
    }


def _hits(deep: np.ndarray, kept: np.ndarray, k: int) -> np.ndarray:
    """[B]: how many of the best k are kept."""
    best = np.argpartition(deep, -k, axis=1)[:, -k:]
    mask = np.zeros(deep.shape, bool)
    np.put_along_axis(mask, kept, True, 1)
    return np.take_along_axis(mask, best, 1).sum(axis=1)


def _recall(deep: np.ndarray, kept: np.ndarray, k: int) -> float:
    return float(_hits(deep, kept, k).mean() / k)


def _directions(chunks: Sequence[np.ndarray], rank: int) -> np.ndarray:
    """[width, <= rank]: the directions in which rows differ most, each scaled to variance 1."""
    rows = sum(len(c) for c in chunks)
    second = sum(c.T @ c for c in chunks) / rows
    middle = sum(c.sum(axis=0) for c in chunks) / rows
    values, vectors = np.linalg.eigh(second - np.outer(middle, middle))
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    strong = values > max(values[0], 0.0) * 1e-6
    return vectors[:, strong] / np.sqrt(values[strong])
