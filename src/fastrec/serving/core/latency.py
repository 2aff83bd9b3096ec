"""How long a call takes: beta + gamma x users + alpha x rows, learnt as calls end.

Sums of products with a weight that halves every few hundred calls, solved when a prediction is
asked for after enough new ones; a small pull towards the last solution keeps it determined where
all calls had the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence

_DECAY = 0.995
_SOLVE_EVERY = 16
# An interrupted call says little about the next one, so it counts as at most this multiple of the
# prediction. A real slowdown still comes through, by this factor a call.
_CLIP = 3.0
_PULL = 1e-3


class LatencyModel:
    """Predicts the seconds of a call from its users and rows."""

    def __init__(self) -> None:
        self.beta, self.gamma, self.alpha = 1e-5, 0.0, 1e-6
        self.count = 0
        # Sums of x x^T (upper triangle) and of x y, x = (1, users, rows).
        self._xx = [0.0] * 6
        self._xy = [0.0] * 3
        # Calls since the last solution; no prediction changes before the next.
        self._new: list[tuple[int, int, float]] = []

    def predict(self, users: int, rows: int) -> float:
        """Seconds."""
        return self.beta + self.gamma * users + self.alpha * rows

    def observe(self, users: int, rows: int, seconds: float, *, seed: bool = False) -> None:
        """Learn from a call.

        Args:
            users, rows: of the call.
            seconds: its time.
            seed: use the time unclipped, and solve at once.
        """
        if self.count == 0:
            self.beta, self.gamma, self.alpha = seconds / 2, 0.0, seconds / 2 / max(rows, 1)
        self.count += 1
        if seed:
            self._add(users, rows, seconds)
            self._solve()
            return
        if self.count > _SOLVE_EVERY:
            expected = self.beta + self.gamma * users + self.alpha * rows
            if seconds > expected * _CLIP:
                seconds = expected * _CLIP
            elif seconds < expected / _CLIP:
                seconds = expected / _CLIP
        self._new.append((users, rows, seconds))
        if len(self._new) >= _SOLVE_EVERY:
            for call in self._new:
                self._add(*call)
            self._new.clear()
            self._solve()

    def _add(self, users: int, rows: int, seconds: float) -> None:
        xx, xy = self._xx, self._xy
        xx[0] = xx[0] * _DECAY + 1
        xx[1] = xx[1] * _DECAY + users
        xx[2] = xx[2] * _DECAY + rows
        xx[3] = xx[3] * _DECAY + users * users
        xx[4] = xx[4] * _DECAY + users * rows
        xx[5] = xx[5] * _DECAY + rows * rows
        xy[0] = xy[0] * _DECAY + seconds
        xy[1] = xy[1] * _DECAY + users * seconds
        xy[2] = xy[2] * _DECAY + rows * seconds

    @property
    def usual_rows(self) -> int:
        """Rows of a user, on average."""
        return round(self._xx[2] / self._xx[1]) if self._xx[1] else 1

    def copy(self) -> LatencyModel:
        """One that learns apart from this."""
        other = LatencyModel()
        other.beta, other.gamma, other.alpha = self.beta, self.gamma, self.alpha
        other.count, other._xx, other._xy = self.count, list(self._xx), list(self._xy)
        other._new = list(self._new)
        return other

    def _solve(self) -> None:
        n, u, r, uu, ur, rr = self._xx
        # In units of the mean users and rows, so that one pull fits all three.
        mu, mr = max(u / n, 1e-9), max(r / n, 1e-9)
        pull = _PULL * n
        a = (
            (n + pull, u / mu, r / mr),
            (u / mu, uu / mu / mu + pull, ur / mu / mr),
            (r / mr, ur / mu / mr, rr / mr / mr + pull),
        )
        old = (self.beta, self.gamma * mu, self.alpha * mr)
        y = (
            self._xy[0] + pull * old[0],
            self._xy[1] / mu + pull * old[1],
            self._xy[2] / mr + pull * old[2],
        )
        # None of the three costs is negative: the largest system with no negative solution.
        for kept in ((0, 1, 2), (0, 2), (1, 2), (0, 1), (2,), (1,), (0,)):
            x = _solved([[a[i][j] for j in kept] for i in kept], [y[i] for i in kept])
            if x is not None and min(x) >= 0:
                full = [0.0, 0.0, 0.0]
                for i, value in zip(kept, x, strict=True):
                    full[i] = value
                self.beta, self.gamma, self.alpha = full[0], full[1] / mu, full[2] / mr
                return


def _solved(a: list[list[float]], y: Sequence[float]) -> list[float] | None:
    """a x = y by elimination with pivots; None where a is singular."""
    n = len(y)
    rows = [[*a[i], y[i]] for i in range(n)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(rows[k][i]))
        if abs(rows[pivot][i]) < 1e-12:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(i + 1, n):
            f = rows[k][i] / rows[i][i]
            for j in range(i, n + 1):
                rows[k][j] -= f * rows[i][j]
    x = [0.0] * n
    for i in reversed(range(n)):
        x[i] = (rows[i][n] - sum(rows[i][j] * x[j] for j in range(i + 1, n))) / rows[i][i]
    return x


class Quantile:
    """A quantile of a stream, followed by steps up and down (Robbins-Monro); constant memory."""

    def __init__(self, q: float, step: float, start: float = 0.0) -> None:
        self.q, self.step, self.value = q, step, start

    def add(self, x: float) -> None:
        """One more value."""
        self.value += self.step * (self.q if x > self.value else self.q - 1)
