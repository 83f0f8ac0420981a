"""Coefficients of sums whose parts cannot be negative. Pure."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def not_negative(matrix: Floats, target: Floats) -> Floats:
    """Least squares; columns whose coefficient would be negative are left out, the most negative one first."""
    found, kept = np.zeros(matrix.shape[1]), list(range(matrix.shape[1]))
    while kept:
        solved = np.linalg.lstsq(matrix[:, kept], target)[0]
        if solved.min() >= 0:
            found[kept] = solved
            break
        kept.pop(int(solved.argmin()))
    return found
