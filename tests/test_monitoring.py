"""The history gives back what was put in, and takes little room."""

import pickle
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from lightning_hpo.monitoring import History, HistoryRecord, log_record

SUMMARY = {"min": 0.0, "mean": 1.5, "max": 3.0, "norm": 4.0}


def record(step, names=("l2",), **options):
    return HistoryRecord(
        step=step,
        values=dict.fromkeys(names, 0.1 * step),
        hypergradients={name: torch.tensor(1.0 * step, dtype=torch.float32) for name in names},
        tangent_norms=dict.fromkeys(names, 2.0 * step),
        skipped=step // 2,
        **options,
    )


def same(a, b):
    assert type(a) is type(b)
    for name in ("step", "skipped", "outcome", "values", "tangent_norms"):
        assert getattr(a, name) == getattr(b, name)
    assert a.hypergradients.keys() == b.hypergradients.keys()
    for name, value in a.hypergradients.items():
        other = b.hypergradients[name]
        if isinstance(value, dict):
            assert value == other
        else:
            assert value.dtype == other.dtype
            assert torch.equal(value, other)


@pytest.mark.parametrize(
    ("value", "hypergradient"),
    [
        (0.3, torch.tensor(0.1, dtype=torch.float32)),
        ([0.1, 0.2], torch.tensor([1.0, -2.0], dtype=torch.float64)),
        ([[0.1, 0.2], [0.3, 0.4]], torch.ones(2, 2)),
        (SUMMARY, SUMMARY),
    ],
    ids=["number", "vector", "matrix", "summary"],
)
@pytest.mark.parametrize("norms", [False, True])
def test_records_come_back_as_they_were(value, hypergradient, norms):
    put = HistoryRecord(
        7, {"a": value}, {"a": hypergradient}, {"a": value} if norms else None, 1, "converged"
    )
    same(History([put])[0], put)
    same(pickle.loads(pickle.dumps(History([put])))[-1], put)


def test_what_the_progress_bar_shows_lies_on_the_host():
    """Lightning reads it at every step, for which the host would wait on a GPU."""
    shown = {}
    module = SimpleNamespace(log_dict=lambda values, **_: shown.update(values))
    trainer = SimpleNamespace(loggers=[], barebones=False)
    put = record(3)
    with torch.device("meta"):
        log_record(trainer, module, put, 3)
    assert shown["hpo/l2"].device.type == "cpu"
    assert shown["hpo/l2"].item() == pytest.approx(0.3)


def test_it_is_a_sequence():
    records = [record(step) for step in range(5)]
    history = History(records)
    assert len(history) == 5
    assert list(map(asdict, history)) == list(map(asdict, records))
    assert [r.step for r in history[1:4]] == [1, 2, 3]
    assert history[-1].step == 4
    assert history == records
    assert history != records[:4]
    with pytest.raises(IndexError):
        history[5]


def test_the_names_may_change():
    """As they do where a checkpoint of other hyperparameters is resumed."""
    records = [record(1), record(2, ("a", "b")), record(3, ("a", "b")), record(4)]
    for a, b in zip(History(records), records, strict=True):
        same(a, b)


def test_a_record_takes_a_few_numbers():
    sizes = []
    for n in (1000, 3000):
        history = History(record(step) for step in range(n))
        sizes.append(len(pickle.dumps(history)))
    # Three numbers, a step, a count of skipped updates, where they start, and the outcome.
    assert (sizes[1] - sizes[0]) / 2000 < 60
