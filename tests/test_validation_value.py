"""Where L_V comes from: what the validation step returns, what it logs, which of them counts."""

from collections import UserDict

import pytest
import torch
from cases import Mlp, fit, frozen, last_hypergradient, observe
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback


class Step(Mlp):
    """Validates with a function of the module, the loss and a batch."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.mean = MeanMetric()
        self.several = MetricCollection({"val_loss": MeanMetric(), "other": MeanMetric()})

    def validation_step(self, batch, batch_idx):
        return self.step(self, self.loss(batch))


def tuned(step, make=T1T2, **arguments):
    callback = OnlineHPOCallback(make(), optimizer=frozen, **arguments)
    fit(Step(step), callback)
    return last_hypergradient(callback)


def updated(m, loss):
    m.mean.update(loss)
    m.log("val_loss", m.mean)


def called(m, loss):
    m.mean(loss)
    m.log("val_loss", m.mean)


def collected(m, loss):
    m.several.update(loss)
    m.log_dict(m.several)


def logs(name, returned=None):
    def step(m, loss):
        m.log(name, loss)
        return returned(m, loss) if callable(returned) else returned

    return step


def by_name(m, loss):
    m.log(name="val_loss", value=loss)


FOUND = {
    "returned": (lambda m, loss: loss, {}),
    "returned-dict": (lambda m, loss: {"loss": loss, "other": 1}, {}),
    "val_loss": (logs("val_loss"), {}),
    "valid_loss": (logs("valid_loss"), {}),
    "validation_loss": (logs("validation_loss"), {}),
    "keywords": (by_name, {}),
    "monitor": (logs("held_out"), {"monitor": "held_out"}),
    "metric-called": (called, {}),
    "metric-updated": (updated, {}),
    "metric-collection": (collected, {}),
    "metric-monitor": (updated, {"monitor": "val_loss"}),
    "returned-tuple": (logs("val_loss", lambda m, loss: (loss, 3 * loss)), {}),
    "returned-object": (logs("val_loss", lambda m, loss: UserDict(x=loss)), {}),
    "returned-many": (logs("val_loss", lambda m, loss: loss * torch.ones(3)), {}),
    "returned-detached": (logs("val_loss", lambda m, loss: loss.detach()), {}),
    "returned-dict-without": (logs("val_loss", lambda m, loss: {"preds": 3 * loss}), {}),
    "monitor-over-tuple": (logs("x", lambda m, loss: (3 * loss, 1)), {"monitor": "x"}),
    "monitor-over-scalar": (logs("x", lambda m, loss: 3 * loss), {"monitor": "x"}),
    "monitor-over-dict": (logs("x", lambda m, loss: {"loss": 3 * loss}), {"monitor": "x"}),
    "function-over-all": (
        logs("x", lambda m, loss: 3 * loss),
        {"monitor": "x", "validation_loss": lambda module, batch: module.loss(batch)},
    ),
}


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("make", [T1T2, ClipR])
def test_the_loss_is_found(kind, make):
    step, arguments = FOUND[kind]
    expected = last_hypergradient(observe(make(), Mlp()))
    # The state of a metric is in float32.
    rtol = 1e-5 if kind.startswith("metric") else 1e-12
    torch.testing.assert_close(tuned(step, make, **arguments), expected, rtol=rtol, atol=0)


def test_a_returned_loss_counts_before_a_logged_one():
    step = logs("val_loss", lambda m, loss: 3 * loss)
    torch.testing.assert_close(tuned(step), 3 * tuned(FOUND["returned"][0]), rtol=1e-12, atol=0)


def detached_metric(m, loss):
    m.mean(loss.detach())
    m.log("val_loss", m.mean)


REFUSED = {
    "nothing": (lambda m, loss: None, {}, "returned no loss and logged nothing"),
    "another-name": (logs("loss"), {}, r"returned no loss and logged \['loss'\]"),
    "monitor-not-logged": (logs("x", lambda m, loss: loss), {"monitor": "y"}, "monitor='y'"),
    "tuple": (lambda m, loss: (loss, 1), {}, "is a tuple, expected a tensor"),
    "number": (lambda m, loss: loss.item(), {}, r"is a float.*\.item\(\)"),
    "logged-number": (lambda m, loss: m.log("val_loss", loss.item()), {}, "logged as 'val_loss'"),
    "many": (lambda m, loss: loss * torch.ones(3), {}, r"has shape \(3,\)"),
    "detached": (lambda m, loss: loss.detach(), {}, "is detached"),
    "metric": (detached_metric, {}, "a metric whose value has no graph, is detached"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_loss_is_refused_with_the_remedy(kind):
    step, arguments, message = REFUSED[kind]
    with pytest.raises(
        MisconfigurationException, match=rf"{message}.*validation_loss=lambda module, batch: "
    ):
        tuned(step, **arguments)


def test_metrics_of_the_validation_stay_without_graphs():
    """Only where a metric is L_V does its state get one: some metrics cannot compute with it."""

    class NoGraph(MeanSquaredError):
        def update(self, preds, target):
            assert not torch.is_grad_enabled()
            super().update(preds, target)

    def step(m, loss):
        m.error.update(loss.reshape(1), torch.zeros(1))
        m.log("error", m.error)
        return loss

    model = Step(step)
    model.error = NoGraph()
    callback = OnlineHPOCallback(T1T2(), optimizer=frozen)
    fit(model, callback)
    assert torch.equal(last_hypergradient(callback), tuned(FOUND["returned"][0]))
