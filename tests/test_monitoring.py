"""The history gives back what was put in, and takes little room."""

import math
import pickle
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from cases import VALID, Mlp, fit, frozen, train_loader, valid_loader

from lightning_hpo import ClipR, OnlineHPOCallback
from lightning_hpo.monitoring import History, HistoryRecord, show_record

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
    for name in ("step", "skipped", "outcome", "loss", "values", "tangent_norms"):
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
        show_record(trainer, module, put, {})
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
    # Four numbers, a step, a count of skipped updates, where they start, and the outcome.
    assert (sizes[1] - sizes[0]) / 2000 < 68


def test_columns_are_flat_and_equally_long():
    put = [
        record(1, ("a",)),
        HistoryRecord(
            step=2,
            values={
                "a": 0.5,
                "b": [[1.0, 2.0]],
                "c": dict.fromkeys(("min", "mean", "max", "norm"), 3.0),
            },
            hypergradients={"b": torch.tensor([[5.0, 6.0]])},
            tangent_norms=None,
            skipped=1,
            outcome="converged",
            loss=0.7,
        ),
    ]
    columns = History(put).columns()
    assert {len(column) for column in columns.values()} == {2}
    assert columns["step"] == [1, 2]
    assert columns["skipped"][1] == 1
    assert math.isnan(columns["loss"][0])
    assert columns["loss"][1] == 0.7
    assert columns["a"] == [put[0].values["a"], 0.5]
    assert columns["b[0,1]"][1] == 2.0
    assert columns["b[0,1]_grad"][1] == 6.0
    assert columns["c.max"][1] == 3.0
    assert math.isnan(columns["b[0,0]"][0])
    assert math.isnan(columns["a_grad"][1])
    assert columns["outcome"][1] == "converged"
    for column in columns.values():
        assert all(isinstance(entry, (int, float, str)) for entry in column)


def test_the_loss_is_that_of_the_held_out_batch():
    """Before the update, at θ_{t+1}: that of a training that stops there."""
    callback = OnlineHPOCallback(ClipR(), optimizer=frozen, every_n_steps=4)
    fit(Mlp(), callback, steps=8)
    for put in callback.history:
        stopped = Mlp()
        fit(stopped, steps=put.step)
        with torch.no_grad():
            assert put.loss == pytest.approx(stopped.loss(VALID).item(), rel=1e-12)


def test_a_picture_has_every_series():
    pytest.importorskip("matplotlib").use("Agg")
    callback = OnlineHPOCallback(ClipR())
    with pytest.raises(RuntimeError, match="no update yet"):
        callback.plot()
    fit(Mlp(), callback, steps=6)
    figure, axes = callback.plot()
    assert axes.shape == (3, 2)
    columns = callback.history.columns()
    for ax, name in zip(axes.T, ("l2.net.0", "l2.net.2"), strict=True):
        assert ax[0].get_title() == name
        assert ax[0].get_yscale() == "log"
        assert list(ax[0].lines[0].get_ydata()) == columns[name]
        assert list(ax[1].lines[0].get_ydata()) == columns[f"{name}_grad"]
        assert list(ax[2].lines[0].get_ydata()) == columns["loss"]
    with pytest.raises(KeyError, match="nothing"):
        callback.plot(["nothing"])
    figure.clear()


def test_without_matplotlib_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match="columns"):
        OnlineHPOCallback().plot()


def test_a_second_fit_has_a_history_of_its_own():
    """Its steps are those of the trainer."""
    callback = OnlineHPOCallback(ClipR(), optimizer=frozen, every_n_steps=2)
    module = Mlp()
    trainer = fit(module, callback, steps=4)
    assert [put.step for put in callback.history] == [2, 4]
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit_loop.max_epochs = 100
    trainer.fit(module, train_loader(), valid_loader())
    assert [put.step for put in callback.history] == [6, 8]
    assert trainer.global_step == 8


def test_reprs_show_what_is_at_work():
    assert (
        repr(ClipR(5.0, stride=2)) == "ClipR(radius=5.0, decay=1.0, stride=2, sync_tangents=True)"
    )
    callback = OnlineHPOCallback(ClipR(), every_n_steps=2)
    assert "ClipR(radius=20.0" in repr(callback)
    assert "every_n_steps=2" in repr(callback)
    fit(Mlp(), callback, steps=4)
    assert "2 updates, last l2.net.0=" in repr(callback)


def test_tables_hold_the_same_numbers():
    put = [
        record(1, ("a",)),
        HistoryRecord(2, {"a": 0.5, "b": SUMMARY}, {"b": SUMMARY}, None, 0, loss=0.7),
        HistoryRecord(3, {"a": 0.6, "b": SUMMARY}, {"b": SUMMARY}, None, 0),
        HistoryRecord(4, {"a": [0.7, 0.8]}, {}, None, 0),
    ]
    history = History(put)
    tables = history.tables()
    expected = torch.tensor([[math.nan] * 4, *[list(SUMMARY.values())] * 2, [math.nan] * 4])
    torch.testing.assert_close(tables["values"]["b"], expected, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(
        tables["hypergradients"]["b"], expected, equal_nan=True, rtol=0, atol=0
    )
    expected = torch.tensor([[math.nan] * 2] * 3 + [[0.7, 0.8]])
    torch.testing.assert_close(tables["values"]["a"], expected, equal_nan=True, rtol=0, atol=0)
    assert tables["tangent_norms"]["a"][0].item() == 2.0
    tables["values"]["a"][3] = 0.0  # a copy: the history stays as it is, and may grow
    history.append(put[0])
    assert history[3].values["a"] == [0.7, 0.8]
    assert history.steps().tolist() == [1, 2, 3, 4, 1]
    assert history.loss_at(1) == 0.7
    assert History().tables() == {"values": {}, "hypergradients": {}, "tangent_norms": {}}
