"""The search over architectures runs, and what it finds can be trained anew."""

import random
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("_digits", "architectures")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    module = __import__("architectures")
    monkeypatch.setattr(module, "STEPS", 61)
    yield module
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(name, None)


def test_search_and_training_anew(script, tmp_path):
    choices, callback = script.search(0, response=True)
    assert callback.history[-1].step == 60
    assert choices.keys() == script.drawn(random.Random(0)).keys()
    assert choices["optimizer.lr"] in script.RATES
    held_out, test, accuracy = script.train_anew(choices, 0)
    assert held_out > 0
    assert test > 0
    assert 0 <= accuracy <= 1
    without, other = script.search(0, response=False)
    assert without.keys() == choices.keys() - {"optimizer.lr"}
    script.plot({"with": callback, "without": other}, tmp_path / "policy.png")
    assert (tmp_path / "policy.png").stat().st_size > 1000
