"""The algorithms in float64 NumPy, one matrix at a time, straight from their equations.

The letters are those of arXiv 2510.17802: a gradient G (m x n), a basis P (m x r), a projection
R = P'G, a residual E = G - P P'G, the inner transformation's update D of R, the update F of a slot,
the sampling probability q, the period K. Random numbers are arguments. Nothing of the library is
used here.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

Matrix = np.ndarray
Matrices = Sequence[Matrix] | np.ndarray
# (state, gradient) -> (update, state); the state None is a fresh start.
Inner = Callable[[Any, Matrix], tuple[Matrix, Any]]
# (state, E, R, D) -> (update, state): what a transformation of residuals is told.
Rule = Callable[[Any, Matrix, Matrix, Matrix], tuple[Matrix, Any]]

A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz(X: Matrix, steps: int = 5, eps: float = 1e-8) -> Matrix:
    if X.shape[0] > X.shape[1]:
        return newton_schulz(X.T, steps, eps).T
    X = X / (np.sqrt(np.sum(X**2)) + eps)
    for _ in range(steps):
        X = A * X + (B * (X @ X.T) + C * (X @ X.T) @ (X @ X.T)) @ X
    return X


def decorrelated(X: Matrix) -> Matrix:
    """MUD's direction: each row, of length one, without its correlations with earlier rows."""
    if X.shape[0] > X.shape[1]:
        return decorrelated(X.T).T
    rows = [_unit(row) for row in np.asarray(X, np.float64)]
    # Forward substitution: y_i = q_i - sum over j < i of (q_i . q_j) y_j
    solved: list[np.ndarray] = []
    for i, row in enumerate(rows):
        solved.append(row - sum((row @ rows[j]) * solved[j] for j in range(i)))
    return np.stack([_unit(row) for row in solved])


def _unit(row: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(row)
    return row / length if length else row


def top_left_singular_vectors(G: Matrix, rank: int) -> Matrix:
    return np.linalg.svd(G, full_matrices=False)[0][:, :rank]


# Inner transformations ----------------------------------------------------------------------------


def identity() -> Inner:
    return lambda state, G: (G, state)


def momentum(decay: float) -> Inner:
    def step(M: Matrix | None, G: Matrix) -> tuple[Matrix, Matrix]:
        M = G if M is None else decay * M + G
        return M, M

    return step


def momentum_polar(beta: float = 0.95, *, nesterov: bool = False) -> Inner:
    def step(R: Matrix | None, G: Matrix) -> tuple[Matrix, Matrix]:
        R = G if R is None else beta * R + G
        return newton_schulz(beta * R + G if nesterov else R), R

    return step


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Inner:
    def step(state: tuple | None, G: Matrix) -> tuple[Matrix, tuple]:
        M, V, t = (0.0 * G, 0.0 * G, 0) if state is None else state
        t = t + 1
        M = b1 * M + (1 - b1) * G
        V = b2 * V + (1 - b2) * G**2
        return (M / (1 - b1**t)) / (np.sqrt(V / (1 - b2**t)) + eps), (M, V, t)

    return step


# Transformations of residuals ---------------------------------------------------------------------


def of_residual(inner: Inner) -> Rule:
    """An inner transformation, which looks at the residual alone: `momentum`, for example."""
    return lambda state, E, R, D: inner(state, E)


def sign() -> Rule:
    """FRUGAL, arXiv 2411.07837."""
    return lambda state, E, R, D: (np.sign(E), state)


def columns() -> Rule:
    """Each of n columns gets the norm sqrt((m - r) / n), unless it is as small as rounding."""

    def step(state: None, E: Matrix, R: Matrix, D: Matrix) -> tuple[Matrix, None]:
        (m, n), r = E.shape, R.shape[0]
        U = np.zeros_like(E)
        for j in range(n):
            size = max(np.linalg.norm(E[:, j]), 2**-8 * np.linalg.norm(R[:, j]))
            if size > 0:
                U[:, j] = np.sqrt((m - r) / n) * E[:, j] / size
        return U, state

    return step


def fira(limit: float | None = 1.01, eps: float = 1e-8, per: str = "column") -> Rule:
    """Fira, arXiv 2410.01623, with alpha = 1; ``limit`` bounds the growth of its norm.

    Of the whole gradient this is APOLLO, arXiv 2412.05270; ``per="matrix"`` is APOLLO-Mini.
    """

    def step(z: float | None, E: Matrix, R: Matrix, D: Matrix) -> tuple[Matrix, float]:
        S = np.zeros_like(E)
        for j in range(E.shape[1]):
            seen, given = (D[:, j], R[:, j]) if per == "column" else (D, R)
            S[:, j] = np.linalg.norm(seen) / (np.linalg.norm(given) + eps) * E[:, j]
        if limit is not None and z is not None and z > 0:
            S = S / (max(np.linalg.norm(S) / (z + eps), limit) / limit)
        return S, float(np.linalg.norm(S))

    return step


def carried_moments(
    C: Matrix, M: Matrix, V: Matrix, t: int, b1: float = 0.9, b2: float = 0.999
) -> tuple[Matrix, Matrix, int]:
    """LDAdam, arXiv 2410.16103, entry by entry: moments of Adam in coordinates turned by C."""
    m, v = M / (1 - b1**t), V / (1 - b2**t)
    turned, spread = np.zeros_like(M), np.zeros_like(V)
    for i, j in np.ndindex(*M.shape):
        turned[i, j] = sum(C[i, k] * m[k, j] for k in range(len(m)))
        variance = sum(C[i, k] ** 2 * (v[k, j] - m[k, j] ** 2) for k in range(len(m)))
        spread[i, j] = abs(variance + turned[i, j] ** 2)
    return turned * (1 - b1**t), spread * (1 - b2**t), t


# Algorithms of N matrices -------------------------------------------------------------------------


@dataclasses.dataclass
class Projection:
    """The basis of one matrix, and the inner transformation's state in its coordinates.

    Attributes:
      inner: what runs on the projected gradients.
      rank: r.
      K: the period.
      bases: one for each period, or None for the top left singular vectors at the refresh.
      carry: what becomes of the state at a refresh: "restart", "keep", or, of a momentum, "rotate";
        of Adam's moments, "projection_aware".
    """

    inner: Inner
    rank: int
    K: int
    bases: Sequence[Matrix] | None = None
    carry: str = "restart"
    P: Matrix | None = None
    state: Any = None

    def basis(self, t: int, G: Matrix) -> Matrix:
        """The basis at step t, with gradient G; steps must be asked for in their order."""
        if t % self.K == 0:
            old = self.P
            self.P = top_left_singular_vectors(G, self.rank)
            if self.bases is not None:
                self.P = self.bases[t // self.K]
            if self.carry == "restart":
                self.state = None
            if self.carry == "rotate" and old is not None:
                self.state = self.P.T @ old @ self.state
            if self.carry == "projection_aware" and old is not None:
                self.state = carried_moments(self.P.T @ old, *self.state)
        assert self.P is not None
        return self.P

    def update(self, R: Matrix) -> Matrix:
        D, self.state = self.inner(self.state, R)
        return D


def uncompressed(inner: Inner, gradients: Sequence[Matrices] | np.ndarray) -> list[list[Matrix]]:
    """The inner transformation on every matrix, from first to last: Muon, if it is Muon's."""

    def updates(i: int, G_i: list[Matrix]) -> Iterator[Matrix]:
        state = None
        for G in G_i:
            U, state = inner(state, G)
            yield U

    return _one_by_one(updates, gradients)


def sampled(
    inner: Inner,
    gradients: Sequence[Matrices] | np.ndarray,
    *,
    q: float,
    draws: Sequence[Collection[int]],
    form: str = "exclusive",
    undrawn: Rule | None = None,
    bases: Sequence[Matrices] | None = None,
    **compression: Any,
) -> list[list[Matrix]]:
    """Unbiased low-rank projection of N matrices, sampled together.

    Args:
      inner: what runs on the compressed gradients.
      gradients: ``gradients[t][i]``, at step t of matrix i.
      q: the probability that a matrix is drawn.
      draws: ``draws[p]``, the matrices that are drawn in period p.
      form: "exclusive" as in the paper, or "additive".
      undrawn: what runs on the residuals of matrices that are not drawn, or None.
      bases: ``bases[p][i]``, or None, see `Projection`.
      **compression: rank, K and carry, see `Projection`.

    Returns:
      ``updates[t][i]``.
    """

    def updates(i: int, G_i: list[Matrix]) -> Iterator[Matrix]:
        low = Projection(inner, bases=_of_matrix(bases, i), **compression)
        slot = other = None
        for t, G in enumerate(G_i):
            P = low.basis(t, G)
            if t % low.K == 0:
                slot = None
            R = P.T @ G
            E = G - P @ R
            D = low.update(R if form == "additive" else R / (1 - q))
            # The rule sees every residual, also of drawn matrices, whose update has no use for it.
            V = 0.0 * E
            if undrawn is not None:
                V, other = undrawn(other, E, R, D)
            if i not in draws[t // low.K]:
                yield P @ D + V
                continue
            F, slot = inner(slot, E / q)
            yield P @ D + F if form == "additive" else F

    return _one_by_one(updates, gradients)


def through(
    inner: Inner,
    rule: Rule,
    gradients: Sequence[Matrices] | np.ndarray,
    *,
    bases: Sequence[Matrices] | None = None,
    **compression: Any,
) -> list[list[Matrix]]:
    """The inner transformation on projections, and beside it another on residuals: Fira, FRUGAL."""

    def updates(i: int, G_i: list[Matrix]) -> Iterator[Matrix]:
        low = Projection(inner, bases=_of_matrix(bases, i), **compression)
        state = None
        for t, G in enumerate(G_i):
            P = low.basis(t, G)
            R = P.T @ G
            D = low.update(R)
            V, state = rule(state, G - P @ R, R, D)
            yield P @ D + V

    return _one_by_one(updates, gradients)


def guided(
    inner: Inner,
    rule: Rule,
    gradients: Sequence[Matrices] | np.ndarray,
    *,
    bases: Sequence[Matrices] | None = None,
    **compression: Any,
) -> list[list[Matrix]]:
    """Whole gradients through a rule that is told what the inner transformation did: APOLLO."""

    def updates(i: int, G_i: list[Matrix]) -> Iterator[Matrix]:
        low = Projection(inner, bases=_of_matrix(bases, i), **compression)
        state = None
        for t, G in enumerate(G_i):
            R = low.basis(t, G).T @ G
            V, state = rule(state, G, R, low.update(R))
            yield V

    return _one_by_one(updates, gradients)


def feedback(
    inner: Inner,
    gradients: Sequence[Matrices] | np.ndarray,
    *,
    decay: float = 0.0,
    bases: Sequence[Matrices] | None = None,
    **compression: Any,
) -> list[list[Matrix]]:
    """Error feedback: what a step leaves out is added to the next gradient (LDAdam, Dion)."""

    def updates(i: int, G_i: list[Matrix]) -> Iterator[Matrix]:
        low = Projection(inner, bases=_of_matrix(bases, i), **compression)
        error = 0.0 * G_i[0]
        for t, G in enumerate(G_i):
            corrected = G + error
            P = low.basis(t, corrected)
            R = P.T @ corrected
            error = corrected - (1 - decay) * P @ R
            yield P @ low.update(R)

    return _one_by_one(updates, gradients)


def _one_by_one(
    updates: Callable[[int, list[Matrix]], Iterator[Matrix]],
    gradients: Sequence[Matrices] | np.ndarray,
) -> list[list[Matrix]]:
    """Runs ``(i, gradients of matrix i) -> its updates`` on each matrix, tall ones transposed."""
    by_matrix = []
    for i in range(len(gradients[0])):
        G_i = [np.asarray(G_t[i]) for G_t in gradients]
        tall = G_i[0].shape[0] > G_i[0].shape[1]
        U_i = updates(i, [G.T for G in G_i] if tall else G_i)
        by_matrix.append([U.T for U in U_i] if tall else list(U_i))
    return [list(U_t) for U_t in zip(*by_matrix, strict=True)]


def _of_matrix(bases: Sequence[Matrices] | None, i: int) -> list[Matrix] | None:
    return None if bases is None else [np.asarray(of_period[i]) for of_period in bases]
