"""The algorithms in float64 NumPy, one matrix at a time, straight from their equations.

The letters are those of arXiv 2510.17802: a gradient G (m x n), a basis P (m x r), a momentum R,
the sampling probability q, the period K. What is random is given from outside. Nothing of the
library is used here.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

Matrix = np.ndarray
Matrices = Sequence[Matrix] | np.ndarray
# (state, gradient) -> (update, state); the state None is a fresh start.
Base = Callable[[Any, Matrix], tuple[Matrix, Any]]

A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz(X: Matrix, steps: int = 5, eps: float = 1e-8) -> Matrix:
    if X.shape[0] > X.shape[1]:
        return newton_schulz(X.T, steps, eps).T
    X = X / (np.sqrt(np.sum(X**2)) + eps)
    for _ in range(steps):
        X = A * X + (B * (X @ X.T) + C * (X @ X.T) @ (X @ X.T)) @ X
    return X


def identity() -> Base:
    return lambda state, G: (G, state)


def momentum_polar(beta: float = 0.95, *, nesterov: bool = False) -> Base:
    def step(R: Matrix | None, G: Matrix) -> tuple[Matrix, Matrix]:
        R = G if R is None else beta * R + G
        return newton_schulz(beta * R + G if nesterov else R), R

    return step


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Base:
    def step(state: tuple | None, G: Matrix) -> tuple[Matrix, tuple]:
        M, V, t = (0.0 * G, 0.0 * G, 0) if state is None else state
        t = t + 1
        M = b1 * M + (1 - b1) * G
        V = b2 * V + (1 - b2) * G**2
        return (M / (1 - b1**t)) / (np.sqrt(V / (1 - b2**t)) + eps), (M, V, t)

    return step


def top_left_singular_vectors(G: Matrix, rank: int) -> Matrix:
    return np.linalg.svd(G, full_matrices=False)[0][:, :rank]


def uncompressed(base: Base, gradients: Sequence[Matrices] | np.ndarray) -> list[list[Matrix]]:
    """The base on every matrix, from the first step to the last: Muon, if it is Muon's."""
    states: list[Any] = [None] * len(gradients[0])
    updates = []
    for G_t in gradients:
        U_t = []
        for i, G in enumerate(G_t):
            U, states[i] = base(states[i], G)
            U_t.append(U)
        updates.append(U_t)
    return updates


def low_rank(
    base: Base,
    gradients: Sequence[Matrices] | np.ndarray,
    *,
    rank: int,
    K: int,
    q: float,
    draws: Sequence[Collection[int]],
    bases: Sequence[Matrices] | None = None,
    restart: bool = True,
    rotate: bool = False,
) -> list[list[Matrix]]:
    """Unbiased low-rank projection of N matrices, sampled together.

    Args:
      base: what runs on the compressed gradients.
      gradients: ``gradients[t][i]``, at step t of matrix i.
      rank: r.
      K: the period.
      q: the probability that a matrix is full-rank.
      draws: ``draws[p]``, the matrices that are full-rank in period p.
      bases: ``bases[p][i]``, or None for the top left singular vectors at the refresh.
      restart: whether a refresh restarts the states of low-rank matrices too.
      rotate: whether a state that goes on, a momentum, is brought into the new basis.

    Returns:
      ``updates[t][i]``.
    """
    N = len(gradients[0])
    if gradients[0][0].shape[0] > gradients[0][0].shape[1]:
        flipped = [[G.T for G in G_t] for G_t in gradients]
        options = {"rank": rank, "K": K, "q": q, "restart": restart, "rotate": rotate}
        turned = low_rank(base, flipped, draws=draws, bases=bases, **options)
        return [[U.T for U in U_t] for U_t in turned]

    P: list[Matrix] = []
    low: list[Any] = [None] * N
    full: list[Any] = [None] * N
    updates = []
    for t, G_t in enumerate(gradients):
        p = t // K
        if t % K == 0:
            old = P
            P = [top_left_singular_vectors(G, rank) for G in G_t]
            P = P if bases is None else list(bases[p])
            low = [None] * N if restart else low
            if rotate and p:
                low = [P[i].T @ old[i] @ low[i] for i in range(N)]
            full = [None] * N
        U_t = []
        for i, G in enumerate(G_t):
            U, low[i] = base(low[i], P[i].T @ G / (1 - q))
            U = P[i] @ U
            if i in draws[p]:
                U, full[i] = base(full[i], (G - P[i] @ P[i].T @ G) / q)
            U_t.append(U)
        updates.append(U_t)
    return updates
