"""One seed, one precision and quiet logs for every test."""

import logging
import random
import signal

import lightning.pytorch  # noqa: F401 - it sets the level of its loggers when it is imported
import numpy as np
import pytest
import torch

# Tests run side by side on few cores: threads of one would only wait for those of another.
torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _reproducible():
    """Seeds everything; float64, in which exact methods can be told from approximate ones."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that users' transforms draw from
    random.seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def within_two_minutes():
    """For tests of several ranks: a hang is a failure."""

    def stop(*_):
        raise TimeoutError("the ranks did not finish within two minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
