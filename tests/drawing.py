"""A module of the user's with a generator of its own, for tests."""

import numpy as np

RNG = np.random.default_rng(7)


def draw() -> float:
    """Draws a number."""
    return float(RNG.random())
