"""GLUE's metrics, in percent, of predictions and labels as arrays of (examples,)."""

from collections.abc import Callable

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share that is right."""
    return 100 * float(np.mean(predicted == labels))


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall of label 1; 0 without any true positive."""
    right = np.sum((predicted == 1) & (labels == 1))
    wrong = np.sum(predicted != labels)
    return 100 * float(2 * right / (2 * right + wrong)) if right else 0.0


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return Matthews' correlation of two labels, 0 where one side is constant.

    It is Pearson's correlation of the two as numbers.
    """
    return pearson(predicted, labels)


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the linear correlation, 0 where one side is constant."""
    x, y = (np.asarray(side, dtype=np.float64) for side in (predicted, labels))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return 100 * float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the correlation of ranks; equal values share the mean of theirs."""
    return pearson(ranks(predicted), ranks(labels))


def ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def pearson_spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of both correlations, which papers report of STS-B."""
    return (pearson(predicted, labels) + spearman(predicted, labels)) / 2
