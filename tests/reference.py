"""Slow, obvious float64 versions of what scalora computes for many layers at once.

One layer at a time, in loops, with nothing left unformed: the weight's whole gradient G, the 2r
rank-one matrices, the weight's whole move.  NumPy arrays; the letters are those of
docs/mathematics.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

Array = np.ndarray


# The memory of an adapter


def leak(rates: list[float], memory: float) -> float:
    """The alpha after steps at these rates: each leaves the weight a share 1/K of what is left.

    A step at half of the highest rate so far is half a step.
    """
    alpha, highest = 1.0, 0.0
    for rate in rates:
        highest = max(highest, rate)
        if highest > 0:
            alpha *= (1 - 1 / memory) ** (rate / highest)
    return alpha


def frozen(W: Array, P: Array, Q: Array, alpha: Array, s: float) -> tuple[Array, Array]:
    """The base weight (m, n), with what P (m, r) loses, and P with its columns times alpha."""
    W, new_P = W.copy(), P.copy()
    (m, r), n = P.shape, Q.shape[0]
    for i in range(m):
        for j in range(r):
            new_P[i, j] = alpha[j] * P[i, j]
            for k in range(n):
                W[i, k] += s * (1 - alpha[j]) * P[i, j] * Q[k, j]
    return W, new_P


def bounded_age(P: Array, U: Array, rate: float, memory: float) -> Array:
    """The alpha, (r,), that leaves no column of P (m, r) made of more than ``memory`` steps.

    A step, ``rate U``, moves the columns by different lengths; their root mean square counts.
    """
    m, r = P.shape
    squares = sum(float(rate * U[i, j]) ** 2 for i in range(m) for j in range(r))
    longest = memory * (squares / r) ** 0.5
    lengths = [sum(float(P[i, j]) ** 2 for i in range(m)) ** 0.5 for j in range(r)]
    return np.array([min(1.0, longest / length) for length in lengths])


def descent(P: Array, g: Array, U: Array, degree: int) -> Array:
    """What one batch says of the optimal lengths of the columns of P (m, r): (2, r).

    The gradient of Q is g (n, r), and U (n, r) is a direction of degree d.  With column j of P
    times a_j, the step through Q lowers the loss by ``eta a_j^(1+d) <g_j, u_j>`` and moves the
    weight by ``eta s a_j^(1+d) |p_j| |u_j|``; half of that squared, times L, is taken off.  The
    best a_j leaves ``(a_j |p_j|)^(1+d)`` at the first row over the second, over ``L eta s^2``.
    """
    found = np.zeros((2, P.shape[1]))
    for j in range(P.shape[1]):
        length = sum(float(P[i, j]) ** 2 for i in range(P.shape[0])) ** 0.5
        for k in range(g.shape[0]):
            # In coordinates in which the column has length 1.
            gradient, direction = g[k, j] / length, U[k, j] / length**degree
            found[0, j] += gradient * direction
            found[1, j] += direction**2
    return found


def shares(descents: Array, degree: int) -> Array:
    """The lengths (r,) that means of these stand for, over their mean; negative ones count as 0."""
    lengths = [max(0.0, float(x / y)) ** (1 / (1 + degree)) for x, y in descents.T]
    mean = sum(lengths) / len(lengths)
    return np.array([x / mean if mean > 0 else 1.0 for x in lengths])


# The optimal scaling


def factor_gradients(G: Array, P: Array, Q: Array, s: float) -> tuple[Array, Array]:
    """The gradients of P (m, r) and Q (n, r) in ``W0 + s P Q^T``, where G (m, n) is W's."""
    (m, r), n = P.shape, Q.shape[0]
    g_P, g_Q = np.zeros((m, r)), np.zeros((n, r))
    for i in range(m):
        for k in range(n):
            for j in range(r):
                g_P[i, j] += s * G[i, k] * Q[k, j]
                g_Q[k, j] += s * G[i, k] * P[i, j]
    return g_P, g_Q


def rank_one_matrices(P: Array, Q: Array, U_P: Array, U_Q: Array, s: float) -> list[Array]:
    """``s P_j U_Q,j^T`` for every column j, then ``s U_P,j Q_j^T``: 2r matrices (m, n)."""
    r = P.shape[1]
    first = [s * np.outer(P[:, j], U_Q[:, j]) for j in range(r)]
    second = [s * np.outer(U_P[:, j], Q[:, j]) for j in range(r)]
    return first + second


def quadratic(matrices: list[Array], G: Array) -> tuple[Array, Array]:
    """H (2r, 2r), every inner product of two matrices, and lambda (2r,), those with G."""
    count = len(matrices)
    H, lam = np.zeros((count, count)), np.zeros(count)
    for i in range(count):
        lam[i] = np.sum(G * matrices[i])
        for k in range(count):
            H[i, k] = np.sum(matrices[i] * matrices[k])
    return H, lam


def objective(matrices: list[Array], G: Array, x: Array, L: float = 1.0) -> float:
    """``1/2 |G/L - sum_i x_i M_i|^2``."""
    remaining = G / L
    for weight, matrix in zip(x, matrices, strict=True):
        remaining = remaining - weight * matrix
    return 0.5 * float(np.sum(remaining**2))


def nonnegative_optimum(matrices: list[Array], G: Array, L: float = 1.0) -> Array:
    """The non-negative weights (2r,) that minimise `objective`."""
    lengths = np.array([np.linalg.norm(matrix) for matrix in matrices])
    lengths[lengths == 0] = 1
    columns = np.stack([M.ravel() / d for M, d in zip(matrices, lengths, strict=True)], axis=1)
    return nnls(columns, G.ravel() / L, maxiter=10_000)[0] / lengths


def scalar_optimum(matrices: list[Array], G: Array, L: float = 1.0) -> Array:
    """The same with one weight for the first r matrices and one for the last r: (2r,)."""
    r = len(matrices) // 2
    tied = [sum(matrices[:r], np.zeros_like(G)), sum(matrices[r:], np.zeros_like(G))]
    return np.repeat(nonnegative_optimum(tied, G, L), r)


def theorem(P: Array, Q: Array, g_P: Array, g_Q: Array, L: float, lr: float) -> Array | None:
    """``[alpha; beta]`` (2r,) as published (arXiv 2510.23818, s = 1); None where not feasible."""
    S_A = np.concatenate([P, g_P], axis=1)
    S_B = np.concatenate([g_Q, Q], axis=1)
    lam = np.concatenate([np.sum(g_Q**2, axis=0), np.sum(g_P**2, axis=0)])
    v = np.linalg.solve((S_A.T @ S_A) * (S_B.T @ S_B), lam)
    return np.sqrt(v) / np.sqrt(L * lr) if np.all(v >= 0) else None


def weights(alpha: Array, beta: Array, lr_P: float, lr_Q: float, degree: int) -> Array:
    """The x (2r,) that a scaling stands for."""
    return np.concatenate([lr_Q * alpha ** (1 + degree), lr_P * beta ** (1 + degree)])


def move(
    P: Array,
    Q: Array,
    U_P: Array,
    U_Q: Array,
    alpha: Array,
    beta: Array,
    lr_P: float,
    lr_Q: float,
    s: float,
    degree: int,
) -> Array:
    """D (m, n): how one step on the re-based pair moves the weight, to first order."""
    new_P, new_Q = P * alpha, Q * beta
    new_U_P, new_U_Q = U_P * beta**degree, U_Q * alpha**degree
    return -s * (lr_P * new_U_P @ new_Q.T + lr_Q * new_P @ new_U_Q.T)


# Moments


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer of the table, with options that change which state it keeps, or how."""

    name: str
    cls: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)


OPTIMIZERS = [
    OptimizerCase("adam", torch.optim.Adam),
    OptimizerCase("adam_amsgrad", torch.optim.Adam, {"amsgrad": True}),
    OptimizerCase("adamw", torch.optim.AdamW),
    OptimizerCase("adamw_amsgrad", torch.optim.AdamW, {"amsgrad": True}),
    OptimizerCase("nadam", torch.optim.NAdam),
    OptimizerCase("radam", torch.optim.RAdam),
    OptimizerCase("adamax", torch.optim.Adamax),
    OptimizerCase("sgd", torch.optim.SGD),
    OptimizerCase("sgd_momentum", torch.optim.SGD, {"momentum": 0.9}),
    OptimizerCase("sgd_dampening", torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    OptimizerCase("sgd_nesterov", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    OptimizerCase("rmsprop", torch.optim.RMSprop),
    OptimizerCase("rmsprop_centered", torch.optim.RMSprop, {"centered": True}),
    OptimizerCase("rmsprop_momentum", torch.optim.RMSprop, {"momentum": 0.9}),
    OptimizerCase(
        "rmsprop_centered_momentum", torch.optim.RMSprop, {"centered": True, "momentum": 0.9}
    ),
    OptimizerCase("adagrad", torch.optim.Adagrad),
    OptimizerCase("adagrad_lr_decay", torch.optim.Adagrad, {"lr_decay": 0.1}),
    OptimizerCase("adafactor", torch.optim.Adafactor),
]


def transferred(state: Array, factor: Array, degree: int, rank_axis: int) -> Array:
    """One layer's state with column j multiplied by ``factor_j ** degree``."""
    columns = np.moveaxis(state.astype(np.float64), rank_axis, 0).copy()
    for j in range(len(factor)):
        for _ in range(degree):
            columns[j] = columns[j] * factor[j]
    return np.moveaxis(columns, 0, rank_axis)


# States of 8-bit codes in blocks


def decoded(codes: Array, absmax: Array, level_map: Array) -> Array:
    """What one tensor's codes stand for; block b of 256 elements has the scale absmax[b]."""
    state = np.zeros(codes.size)
    for i, code in enumerate(codes.ravel()):
        state[i] = float(level_map[code]) * float(absmax[i // 256])
    return state.reshape(codes.shape)


def block_scales(state: Array, level_map: Array) -> Array:
    """The smallest absmax of every block with which no element is beyond the map's ends."""
    scales = np.zeros(-(-state.size // 256))
    for i, value in enumerate(state.ravel()):
        end = level_map[0] if value < 0 else level_map[-1]
        scales[i // 256] = max(scales[i // 256], float(value) / float(end))
    return scales


def quantization_gaps(state: Array, absmax: Array, level_map: Array) -> Array:
    """For every element the distance of the two levels around it, times its block's absmax."""
    levels = [float(level) for level in level_map]
    gaps = np.zeros(state.size)
    for i, value in enumerate(state.ravel()):
        scale = float(absmax[i // 256])
        if scale == 0:
            continue
        position = min(max(float(value) / scale, levels[0]), levels[-1])
        above = next(k for k in range(1, len(levels)) if position <= levels[k])
        gaps[i] = (levels[above] - levels[above - 1]) * scale
    return gaps.reshape(state.shape)


# Rounding


@cache
def representable(dtype: torch.dtype) -> Array:
    """Every finite value of a 16-bit floating dtype, ascending, as float64."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = words.view(dtype).double().numpy()
    return np.unique(values[np.isfinite(values)])


def neighbours(values: Array, dtype: torch.dtype) -> tuple[Array, Array]:
    """The largest representable value not above, the smallest not below; clamped at the ends."""
    grid = representable(dtype)
    below = np.searchsorted(grid, values, side="right") - 1
    above = np.searchsorted(grid, values, side="left")
    return grid[below.clip(0)], grid[above.clip(max=len(grid) - 1)]


def noise_word(seed: int, position: int) -> int:
    """The 32 random bits of one element of a weight, in Python's integers."""
    x = (position * 0x9E3779B9 + seed) % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)
