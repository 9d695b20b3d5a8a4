"""A module of the user's with a generator and a count of its own, for tests."""

import numpy as np

RNG = np.random.default_rng(7)
COUNT = 0


def draw() -> float:
    """Draws a number."""
    return float(RNG.random())
