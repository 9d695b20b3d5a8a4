"""Blocks under other random numbers: these are repeated, and those of the training go on."""

# ruff: noqa: NPY002 - the legacy generator is what this is about

import random

import numpy as np
import pytest
import torch

from lightning_hpo import rng
from lightning_hpo.rng import RandomState, forked_rng

CPU = torch.device("cpu")
DRAWS = {
    "nothing": lambda: None,
    "torch": lambda: torch.rand(2).tolist(),
    "python": random.random,
    "uniform": lambda: np.random.rand(2).tolist(),
    "normal": lambda: np.random.randn(),  # makes two, and keeps one
    "normals": lambda: np.random.randn(2).tolist(),
    "many": lambda: np.random.rand(700).tolist(),
    "seed": lambda: np.random.seed(5),
}


@pytest.fixture(autouse=True)
def _seeded():
    with forked_rng(CPU):
        torch.manual_seed(1)
        np.random.seed(2)
        random.seed(3)
        yield


@pytest.mark.parametrize("before", DRAWS)
@pytest.mark.parametrize("draw", DRAWS)
def test_what_a_block_draws_is_put_back(before, draw):
    DRAWS[before]()
    state = RandomState.capture(CPU)
    with forked_rng(CPU):
        DRAWS[draw]()
    assert state.differences(RandomState.capture(CPU)) == []


@pytest.mark.parametrize("before", DRAWS)
@pytest.mark.parametrize("between", DRAWS)
@pytest.mark.parametrize("draw", DRAWS)
def test_a_block_draws_what_its_state_draws(before, between, draw):
    DRAWS[before]()
    state = RandomState.capture(CPU)
    drawn = DRAWS[draw]()
    DRAWS[between]()
    present = RandomState.capture(CPU)
    for _ in range(2):
        with forked_rng(CPU, state):
            assert DRAWS[draw]() == drawn
    assert present.differences(RandomState.capture(CPU)) == []


@pytest.mark.parametrize("before", DRAWS)
def test_the_state_of_numpy_is_what_numpy_says(before):
    DRAWS[before]()
    kind, words, *rest = RandomState.capture(CPU).numpy
    truth = np.random.get_state()
    assert [kind, *rest] == [truth[0], *truth[2:]]
    assert np.array_equal(words, truth[1])
    assert words.dtype == truth[1].dtype


def test_a_generator_of_another_kind():
    """It cannot be put back as bytes, but as what NumPy gives."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(4))
    try:
        with pytest.warns(RuntimeWarning, match="legacy"), forked_rng(CPU):
            drawn = np.random.rand()
        assert np.random.rand() == drawn
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("is_known", [True, False], ids=["as known", "of another layout"])
def test_numpy_of_another_layout_is_asked_itself(is_known, monkeypatch):
    if not is_known:
        monkeypatch.setattr(rng, "_as_memory", lambda words, position: b"something else")
    rng._is_laid_out_so.cache_clear()
    assert (rng._memory_of_numpy() is None) is not is_known
    before = np.random.get_state()[1].tolist()
    with forked_rng(CPU):
        np.random.rand(700)
    assert np.random.get_state()[1].tolist() == before
    rng._is_laid_out_so.cache_clear()
