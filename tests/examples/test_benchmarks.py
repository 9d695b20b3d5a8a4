"""The benchmark scripts measure what they say; nothing here looks at a time."""

import math
import sys
from pathlib import Path

import pytest
import torch

from lightning_hpo import named_hyperparameters

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Imports the scripts as they import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("_common", "overhead", "peers", "scaling")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: __import__(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_stepper_moves_only_when_told(scripts):
    seen = []
    stepper = scripts["_common"].Stepper(lambda batches: seen.extend(batches), [0, 1, 2])
    assert seen == []
    stepper.advance(4)
    stepper.advance(1)
    stepper.close()
    # The list is complete after the end: extend() takes the batches one by one.
    assert seen == [1, 2, 0, 1, 2]


def test_stepper_reports_errors(scripts):
    def train(batches):
        next(iter(batches))
        raise KeyError("broken")

    stepper = scripts["_common"].Stepper(train, [0])
    with pytest.raises(KeyError, match="broken"):
        stepper.advance(2)


def test_peak_memory_sees_a_tensor_that_is_freed(scripts):
    common = scripts["_common"]
    if common.memory_problem("cpu"):
        pytest.skip(common.memory_problem("cpu"))

    def prepare(is_warmup):
        def train(batches):
            for step, _ in enumerate(batches):
                if step == 1:
                    torch.ones(2**15 if is_warmup else 32 * 2**20, dtype=torch.uint8)

        return train

    first, second = common.peak_memory(prepare, [0], (5, 10))
    assert 31.5 < first < 34.0
    assert second < 2.0


def test_an_interleaved_pair_takes_its_steps(scripts):
    common, overhead = scripts["_common"], scripts["overhead"]
    architecture = common.Architecture(lambda: common.mlp(8), 10, [])
    options = common.argparse.Namespace(device="cpu", threads=1, quick=True)
    bench = overhead.Bench(architecture, options)
    case = overhead.Case("L2", "T1T2", overhead.T1T2, 5, kinds=overhead.TIED)
    timing = bench.time(case, block=5)
    assert len(timing.baseline) == len(timing.method) == math.prod(bench.repeats.values())
    assert timing.ratio > 0


def test_every_case_can_be_made(scripts):
    common, overhead = scripts["_common"], scripts["overhead"]
    for architecture in common.ARCHITECTURES.values():
        for case in overhead.cases():
            tuned = overhead.make_module(architecture, case.kinds, is_tuned=True)
            plain = overhead.make_module(architecture, case.kinds, is_tuned=False)
            names = set(named_hyperparameters(tuned))
            fixed = set(named_hyperparameters(plain))
            assert names
            assert {n for n in names if not n.startswith("l2")} == fixed
            assert isinstance(case.estimator(), overhead.Estimator)


def test_the_floor_is_the_one_step_hypergradient(scripts):
    common, peers = scripts["_common"], scripts["peers"]
    data = common.make_data(20, 200)
    own = peers.our_hypergradients(1, data, 3)
    floor = peers.their_hypergradients(peers.train_floor, 1, data, 3)
    assert len(own) == 3
    assert all(own)
    assert floor == pytest.approx(own, rel=1e-10)


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_peers_agree_with_ours(scripts, name, k):
    pytest.importorskip(name)
    common, peers = scripts["_common"], scripts["peers"]
    data = common.make_data(20, 200)
    train = peers.LIBRARIES[name][2]
    own = peers.our_hypergradients(k, data, 3)
    assert peers.their_hypergradients(train, k, data, 3) == pytest.approx(own, rel=1e-10)


def test_what_is_not_installed_is_named(scripts, monkeypatch):
    peers = scripts["peers"]
    monkeypatch.setitem(peers.LIBRARIES, "nowhere", ("nowhere", "nowhere_at_all", None))
    found, missing = peers.find_libraries()
    assert "nowhere_at_all" in missing["nowhere"]
    assert {name.split()[0] for name in found} | set(missing) >= {"higher", "torchopt", "betty"}
