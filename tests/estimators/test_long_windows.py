"""Windows that keep every √K-th step, and windows that are repeated."""

import math

import lightning.pytorch as pl
import pytest
import torch
from cases import (
    OPTIMIZERS,
    STEPS,
    VALID,
    Mlp,
    fit,
    frozen,
    last_hypergradient,
    observe,
    train_loader,
)

from lightning_hpo import ClipR, L2Mixin, OnlineHPOCallback, UnrollK
from lightning_hpo.estimators import _reverse


@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("inside_loss", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_thinned_windows_give_the_same(optimizer, inside_loss, clip, monkeypatch):
    """Ten steps, of which the first, fourth, seventh and tenth are kept."""
    options = {
        None: {},
        "norm": {"gradient_clip_val": 0.3},
        "value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    }[clip]

    def run():
        model = Mlp(optimizer, inside_loss=inside_loss)
        return last_hypergradient(observe(UnrollK(STEPS, "reverse"), model, **options))

    whole = run()
    monkeypatch.setattr(_reverse, "KEPT_STEPS", 2)
    torch.testing.assert_close(run(), whole, rtol=1e-9, atol=0)


def test_thinned_windows_with_accumulation_and_dropout(monkeypatch):
    class Dropped(Mlp):
        def __init__(self):
            super().__init__("adam", inside_loss=True)
            self.net.insert(2, torch.nn.Dropout(0.3))

    def run():
        torch.manual_seed(3)
        model = Dropped()
        options = {"train": train_loader(batch_size=4), "accumulate_grad_batches": 2}
        return last_hypergradient(observe(UnrollK(STEPS, "reverse"), model, **options))

    whole = run()
    monkeypatch.setattr(_reverse, "KEPT_STEPS", 2)
    torch.testing.assert_close(run(), whole, rtol=1e-9, atol=0)


def test_thinned_records_hold_no_tensors_in_between(monkeypatch):
    monkeypatch.setattr(_reverse, "KEPT_STEPS", 2)
    sizes = []

    class Watching(UnrollK):
        def observe(self, step):
            super().observe(step)
            sizes.append(sum(bool(step.point.theta) for step in self._mechanism._steps))

    observe(Watching(9, "reverse"), Mlp("adam"), steps=9)
    assert sizes == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_restart_repeats_the_window_from_its_start(mode):
    """Every window starts from the same θ and optimizer state, with another λ."""
    starts, buffers = [], []

    class Watching(Mlp):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step % 5 == 0:
                starts.append([p.detach().clone() for p in self.net.parameters()])
                state = self.trainer.optimizers[0].state
                buffers.append([len(state[p]) for p in self.net.parameters()])

    # One epoch has five batches: every window sees the same.
    model = Watching("momentum", schedule=False)
    callback = OnlineHPOCallback(
        UnrollK(5, mode, restart=True), optimizer=lambda raw: torch.optim.SGD(raw, lr=3.0)
    )
    fit(model, callback, steps=20)
    assert len(callback.history) == 4
    for start, filled in zip(starts[1:], buffers[1:], strict=True):
        assert filled == buffers[0]
        for a, b in zip(start, starts[0], strict=True):
            assert torch.equal(a, b)
    values = [record.values["l2.net.2"] for record in callback.history]
    assert len(set(values)) == 4

    # The hypergradient of each window is that of a whole training with that λ.
    def trained(raw):
        other = Mlp("momentum", schedule=False, raw=raw)
        fit(other, steps=5)
        with torch.no_grad():
            return other.loss(VALID).item()

    raw = [math.log(callback.history[1].values[f"l2.net.{k}"]) for k in (0, 2)]
    h = 1e-4
    truth = (trained([raw[0], raw[1] + h]) - trained([raw[0], raw[1] - h])) / (2 * h)
    found = callback.history[2].hypergradients["l2.net.2"].item()
    assert found == pytest.approx(truth, rel=1e-5)


def test_restart_returns_the_buffers_too():
    class Normed(Mlp):
        def __init__(self):
            super().__init__("momentum")
            self.net.insert(1, torch.nn.BatchNorm1d(5))

    model = Normed()
    fit(model, OnlineHPOCallback(UnrollK(5, restart=True)), steps=10)
    assert model.net[1].num_batches_tracked.item() == 0
    assert not model.net[1].running_mean.any()


class Quadratic(L2Mixin, pl.LightningModule):
    """L_T = ½ wᵀHw − Σ w with curvatures from 0.1 to 1; L_V pulls along one direction."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.register_l2(init=0.1, parameters=["w"])

    def training_step(self, batch, batch_idx):
        h = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
        return 0.5 * (h * self.w.square()).sum() - self.w.sum()

    def validation_step(self, batch, batch_idx):
        return self.w.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.9)


def test_stride_has_the_fixed_point_of_every_step():
    """At the minimum both end at −H⁻¹B, and with it at the derivative of a whole training.

    Before, the tangents of every third step lag behind.
    """

    def found(stride, steps):
        return last_hypergradient(
            observe(ClipR(math.inf, stride=stride), Quadratic(), steps=steps)
        ).item()

    h = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64) + 0.1
    truth = (-2 * 0.1 / h**3).sum().item()  # w = 1/h, dw/d(log λ) = −λ/h²
    assert found(3, 600) == pytest.approx(truth, rel=1e-6)
    assert found(1, 600) == pytest.approx(truth, rel=1e-6)
    assert found(3, 9) / found(1, 9) < 0.9


def test_stride_replays_every_nth_step_only():
    replays = []

    class Counting(Mlp):
        def training_step(self, batch, batch_idx):
            if "log" in vars(self):
                replays.append(self.global_step)
            return super().training_step(batch, batch_idx)

    fit(Counting(), OnlineHPOCallback(ClipR(stride=4), optimizer=frozen), steps=12)
    # Steps 4, 8 and 12 are observed. At step 4 the tangent is still 0, and there is nothing to
    # multiply with the Hessian; the first batch is replayed for checks.
    assert [step for step in replays if step > 0] == [7, 11]


@pytest.mark.parametrize("stride", [0, -1, 1.5, True])
def test_a_bad_stride_is_refused(stride):
    with pytest.raises(ValueError, match=r"stride=.*expected a positive integer"):
        ClipR(stride=stride)


def test_a_long_window_holds_what_does_not_change_once():
    """Large buffers and attributes, and random states that nothing has drawn from."""

    class Large(Mlp):
        def __init__(self):
            super().__init__(inside_loss=True)
            self.register_buffer("table", torch.zeros(20_000))
            self.register_buffer("count", torch.zeros(20_000))
            self.positions = torch.zeros(20_000)

        def training_step(self, batch, batch_idx):
            self.count += 1
            return super().training_step(batch, batch_idx)

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 9:
                window = callback._run.served[0].estimator._mechanism
                self.moments = [step.moments[0][0] for step in window._steps]

    model = Large()
    callback, look = OnlineHPOCallback(UnrollK(10, "reverse")), Look()
    fit(model, [callback, look])
    own = [m.state.values for m in look.moments]
    assert len({id(values[id(model.table)]) for values in own}) == 1
    assert len({id(values[id(model.positions)]) for values in own}) == 1
    assert [values[id(model.count)][0].item() for values in own] == list(range(9))
    assert len({id(m.rng.python) for m in look.moments}) == 1
    assert len({id(m.rng.numpy) for m in look.moments}) == 1
