"""What ordinary modules and trainings do, and replays must neither miss nor disturb."""

import math
import warnings

import numpy as np
import pytest
import torch
from cases import (
    STEPS,
    VALID,
    FineTuned,
    MemoryLogger,
    Mlp,
    fit,
    flat,
    frozen,
    last_hypergradient,
    make_trainer,
    observe,
    train_loader,
    valid_loader,
    validation_loss,
)
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lightning_hpo import (
    T1T2,
    ClipR,
    Hyperparameter,
    OnlineHPOCallback,
    Positive,
    UnrollK,
    named_hyperparameters,
)
from lightning_hpo.hyper_optimizer import HyperOptimizer

ESTIMATORS = {
    "T1T2": T1T2,
    "RTHO": lambda: ClipR(math.inf),
    "reverse": lambda: UnrollK(STEPS, "reverse"),
}
WHOLE = {name: make for name, make in ESTIMATORS.items() if name != "T1T2"}


def weights(model):
    return flat([p.detach() for p in model.parameters()])


class Meter:
    def __init__(self):
        self.total = 0.0
        self.history = []


class Habits(Mlp):
    """A sum of habits that have nothing to do with the loss's mathematics."""

    def __init__(self, **options):
        super().__init__(inside_loss=True, **options)
        self.teacher = nn.Linear(4, 3)
        self.teacher.requires_grad_(False)
        self.rng = np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)
        self.meter = Meter()

    def training_step(self, batch, batch_idx):
        x, y = batch.pop("x"), batch.pop("y")
        x.add_(0.1 * float(self.rng.standard_normal()))
        x = x + 0.1 * torch.randn(x.shape, generator=self.generator)
        self.teacher.weight.mul_(0.9).add_(0.01)
        loss = self.loss((x, y)) + self.penalty() + 0.1 * (self.net(x) - self.teacher(x)).norm()
        self.meter.total += loss.item()
        self.meter.history.append(batch_idx)
        self.log("meter", self.meter.total)
        return loss


def named_batches():
    return train_loader(
        collate_fn=lambda items: {
            "x": torch.stack([x for x, _ in items]),
            "y": torch.stack([y for _, y in items]),
        }
    )


def single(loader):
    data = torch.utils.data.TensorDataset(
        *(t.float() if t.is_floating_point() else t for t in loader.dataset.tensors)
    )
    return torch.utils.data.DataLoader(data, batch_size=loader.batch_size)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_habits_are_undisturbed(make):
    runs = []
    for callbacks in ([], [OnlineHPOCallback(make(), optimizer=frozen)]):
        torch.manual_seed(0)
        model, logger = Habits(), MemoryLogger()
        fit(model, callbacks, train=named_batches(), logger=logger, log_every_n_steps=1)
        logged = [m["meter"] for _, m in logger.entries if "meter" in m]
        runs.append((weights(model), logged, model.meter.history))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
    assert len(runs[0][1]) == STEPS


class Drifting(Mlp):
    """Its loss follows a counter of its own, the epoch, and what its own hook sets."""

    def __init__(self, raw=None):
        super().__init__("momentum", inside_loss=True, raw=raw)
        self.calls = 0

    def on_train_batch_start(self, batch, batch_idx):
        self.scale = 1 + 0.2 * float(torch.rand(()))

    def training_step(self, batch, batch_idx):
        self.calls += 1
        factor = self.scale * (1 + 0.5 * self.current_epoch) * min(1.0, self.calls / 8)
        return self.loss(batch) * self.scale + self.penalty() * factor


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_losses_that_drift_are_followed(make):
    def trained(j, h):
        raw = [math.log(0.05)] * 2
        raw[j] += h
        model = Drifting(raw)
        torch.manual_seed(5)
        fit(model)
        with torch.no_grad():
            return model.loss(VALID).item()

    h = 1e-4
    truth = torch.tensor([(trained(j, h) - trained(j, -h)) / (2 * h) for j in range(2)])
    torch.manual_seed(5)
    callback = observe(make(), Drifting())
    torch.testing.assert_close(last_hypergradient(callback), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_learning_rate_that_is_a_tensor(kind, make):
    class TensorRate(Mlp):
        def __init__(self, lr):
            super().__init__()
            self.lr = lr

        def configure_optimizers(self):
            optimizer = kind(self.parameters(), lr=self.lr)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
            }

    found = last_hypergradient(observe(make(), TensorRate(torch.tensor(0.1))))
    truth = last_hypergradient(observe(make(), TensorRate(0.1)))
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=0)


def test_a_penalty_in_a_shared_step_has_no_part_in_the_validation_loss():
    class Shared(Mlp):
        def validation_step(self, batch, batch_idx):
            return self.training_step(batch, batch_idx)

    found = last_hypergradient(observe(T1T2(), Shared(inside_loss=True)))
    truth = last_hypergradient(observe(T1T2(), Mlp(inside_loss=True)))
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)


def test_a_hook_that_changes_gradients_is_warned_about():
    class Scaling(Mlp):
        def on_after_backward(self):
            for p in self.net.parameters():
                p.grad.mul_(0.3)

    with pytest.warns(UserWarning, match="differs from that of a replay"):
        observe(T1T2(), Scaling())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        observe(T1T2(), Mlp())


# -------------------------------------------------------------------------------- λ's own precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_raw_stays_in_single_precision(dtype):
    h = Hyperparameter(torch.tensor(1e-4, dtype=torch.float32), Positive())
    raw = h.raw.clone()
    nn.Sequential(h).to(dtype)
    assert h.raw.dtype == torch.float32
    assert torch.equal(h.raw, raw)
    assert nn.Sequential(h).double()[0].raw.dtype == torch.float64


def test_small_steps_are_not_lost_under_bf16_true():
    torch.set_default_dtype(torch.float32)
    model = Mlp(init=1e-4).float()
    callback = OnlineHPOCallback(T1T2())
    fit(
        model,
        callback,
        precision="bf16-true",
        train=single(train_loader()),
        valid=single(valid_loader()),
    )
    values = [record.values["l2.net.0"] for record in callback.history]
    assert len(set(values)) == len(values) == STEPS


@pytest.mark.parametrize(
    ("factory", "gradient"),
    [(lambda raw: torch.optim.SGD(raw, lr=10.0), 1e38), (lambda raw: torch.optim.Adam(raw), 1e22)],
    ids=["value", "state"],
)
def test_an_update_that_overflows_is_taken_back(factory, gradient):
    h = Hyperparameter(torch.tensor(0.5, dtype=torch.float32))
    optimizer = HyperOptimizer({"h": h}, factory)
    assert optimizer.step([torch.tensor(0.1)])
    before = h.raw.clone()
    assert not optimizer.step([torch.tensor(gradient)])
    assert torch.equal(h.raw, before)
    assert optimizer.step([torch.tensor(0.1)])
    assert not torch.equal(h.raw, before)


# --------------------------------------------------------------------------------------- life cycle


def test_a_state_that_a_test_loads_does_not_reach_the_next_training(tmp_path):
    class Tested(Mlp):
        def test_step(self, batch, batch_idx):
            self.log("test", self.loss(batch))

    callback = OnlineHPOCallback(T1T2())
    trainer = fit(Tested(), callback)
    path = str(tmp_path / "last.ckpt")
    trainer.save_checkpoint(path)
    trainer.test(trainer.lightning_module, valid_loader(), ckpt_path=path)
    fit(Tested(), callback, steps=5)
    assert [record.step for record in callback.history] == [1, 2, 3, 4, 5]


def test_loggers_get_the_step_of_the_trainer():
    logger, callback = MemoryLogger(), OnlineHPOCallback(T1T2())
    model = Mlp()
    trainer = make_trainer(5, callbacks=callback, logger=logger, log_every_n_steps=1)
    trainer.fit(model, train_loader(), valid_loader())
    trainer.fit_loop.epoch_loop.max_steps = 10
    trainer.fit_loop.max_epochs = 5
    trainer.fit(model, train_loader(), valid_loader())
    steps = [step for step, metrics in logger.entries if "hpo/l2.net.0" in metrics]
    assert steps == list(range(1, 11))


def test_nothing_is_held_after_the_training():
    import pickle

    callback = OnlineHPOCallback(ClipR(5.0), optimizer=frozen)
    trainer = fit(Mlp(), callback)
    held = pickle.loads(pickle.dumps(callback))
    assert len(held.history) == STEPS
    assert not hasattr(callback.estimator, "problem")
    assert trainer.callbacks[0].state_dict()["steps"] == STEPS


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_parameters_that_join_later(make):
    """Backbone fine-tuning gives the optimizer a parameter group at a later epoch."""

    callback = OnlineHPOCallback(make(), optimizer=frozen)
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    fit(FineTuned(), [unfreeze, callback], steps=20)
    assert all(torch.isfinite(record.hypergradients["l2"]) for record in callback.history)
    assert callback.history[-1].step == 20


def test_a_layer_that_is_frozen_at_first_is_tuned_once_it_trains():
    class Later(Mlp):
        def __init__(self):
            super().__init__("momentum")
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

    model = Later()
    callback = OnlineHPOCallback(ClipR(5.0))
    with pytest.warns(UserWarning, match=r"'l2\.net\.0' has no effect as long as"):
        fit(model, callback, steps=10)
    first, second = (
        [record.hypergradients["l2.net.0"].item() for record in callback.history[part]]
        for part in (slice(0, 5), slice(5, 10))
    )
    assert first == [0.0] * 5
    assert all(h != 0 for h in second)


def test_a_parameter_that_leaves_the_training_has_a_zero_tangent():
    """As if the tangent had been cut there: forward and reverse mode agree on it."""

    class Leaving(Mlp):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 2:
                self.net[0].requires_grad_(False)

    found = {}
    for name, make in {
        "RTHO": lambda: ClipR(math.inf),
        "forward": lambda: UnrollK(4, "forward"),
        "reverse": lambda: UnrollK(4, "reverse"),
    }.items():
        model = Leaving("momentum", inside_loss=True)
        callback = OnlineHPOCallback(make(), optimizer=frozen, every_n_steps=4)
        fit(model, callback, steps=4)
        found[name] = torch.stack(list(callback.history[-1].hypergradients.values()))
    torch.testing.assert_close(found["forward"], found["RTHO"], rtol=1e-10, atol=0)
    torch.testing.assert_close(found["reverse"], found["RTHO"], rtol=1e-10, atol=0)
    # λ of the layer that has left goes on acting through nothing but what it did to the other.
    whole = observe(ClipR(math.inf), Mlp("momentum", inside_loss=True), steps=4)
    assert (found["RTHO"] - last_hypergradient(whole)).norm() > 1e-6


class Arriving(Mlp):
    """Its first layer trains from the third step on."""

    def __init__(self, raw=None):
        super().__init__("adam", inside_loss=True, raw=raw)
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 2:
            self.net[0].requires_grad_(True)


class Unfreezing(Arriving):
    """The step itself lets it."""

    def on_train_batch_start(self, batch, batch_idx):
        pass

    def training_step(self, batch, batch_idx):
        self.net[0].requires_grad_(self.global_step >= 2)
        return super().training_step(batch, batch_idx)


class Teacher(Mlp):
    """A frozen copy of the network follows it, and the loss follows the copy."""

    def __init__(self, raw=None):
        super().__init__("momentum", inside_loss=True, raw=raw)
        self.teacher = nn.Linear(4, 3)
        self.teacher.requires_grad_(False)
        nn.init.constant_(self.teacher.weight, 0.1)
        nn.init.zeros_(self.teacher.bias)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (self.net(batch[0]) - self.teacher(batch[0])).square().mean()

    def on_train_batch_end(self, *args):
        self.teacher.weight.mul_(1.5).add_(0.1)


@pytest.mark.parametrize("kind", [Arriving, Unfreezing, Teacher])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
def test_a_window_sees_every_parameter_as_it_was(kind, mode, derivatives):
    """Also those that had no gradient at that step."""
    callback = OnlineHPOCallback(UnrollK(4, mode), optimizer=frozen, derivatives=derivatives)
    fit(kind(), callback, steps=4)
    found = torch.stack(list(callback.history[-1].hypergradients.values()))
    epsilon = 1e-5
    for k, h in enumerate(found):
        ends = []
        for sign in (1, -1):
            raw = [math.log(0.05)] * 2
            raw[k] += sign * epsilon
            model = kind(raw)
            fit(model, steps=4)
            ends.append(validation_loss(model))
        truth = (ends[0] - ends[1]) / (2 * epsilon)
        assert h.item() == pytest.approx(truth, rel=1e-5)


def test_a_parameter_that_leaves_and_comes_back():
    """Its tangent starts from zero again, in both modes."""

    class Wandering(Mlp):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].requires_grad_(self.global_step != 2)

    found = []
    for mode in ("forward", "reverse"):
        callback = OnlineHPOCallback(UnrollK(5, mode), optimizer=frozen)
        fit(Wandering("adam", inside_loss=True), callback, steps=5)
        found.append(torch.stack(list(callback.history[-1].hypergradients.values())))
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


def test_weights_of_another_precision():
    class Mixed(Mlp):
        pass

    model = Mixed()
    for h in named_hyperparameters(model).values():
        h.raw = h.raw.float()
    callback = observe(ClipR(math.inf), model)
    truth = observe(ClipR(math.inf), Mlp())
    torch.testing.assert_close(
        last_hypergradient(callback).double(), last_hypergradient(truth), rtol=1e-4, atol=0
    )


def test_a_weight_that_is_gone_is_named():
    model = Mlp()
    nn.utils.parametrizations.weight_norm(model.net[0])
    with pytest.raises(Exception, match=r"'weight' of a ParametrizedLinear, which no longer"):
        fit(model)


def test_keyword_arguments_of_a_step_are_left_alone():
    class Keywords(Mlp):
        def training_step(self, batch, **options):
            return super().training_step(batch, 0)

    assert len(observe(ClipR(), Keywords(), steps=3).history) == 3


class Written(torch.optim.Optimizer):
    """Plain gradient descent, as people write it by hand."""

    def __init__(self, parameters, style):
        super().__init__(parameters, {"lr": 0.1})
        self.style = style

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if self.style == "data":
                    p.data.add_(p.grad.data, alpha=-group["lr"])
                elif self.style == "no_grad":
                    with torch.no_grad():
                        p.add_(p.grad, alpha=-group["lr"])
                else:
                    p.add_(p.grad, alpha=-group["lr"])


class OwnAdam(torch.optim.Adam):
    """What differs from the closed form may be anything."""


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_subclass_of_adam_with_dead_units(make):
    """Its first step is that of sign(g), which jumps where g is zero."""

    class Dead(Mlp):
        kind = torch.optim.Adam

        def __init__(self):
            super().__init__(activation=nn.ReLU)
            with torch.no_grad():
                self.net[0].bias[:2] = -100.0

        def configure_optimizers(self):
            return self.kind(self.parameters(), lr=0.01)

    class Own(Dead):
        kind = OwnAdam

    found, expected = (last_hypergradient(observe(make(), kind())) for kind in (Own, Dead))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("style", ["data", "no_grad", "plain"])
def test_optimizers_written_by_hand(style, make):
    class Custom(Mlp):
        def configure_optimizers(self):
            return Written(self.parameters(), style)

    expected = Mlp("sgd", schedule=False)
    expected.configure_optimizers = lambda: torch.optim.SGD(expected.parameters(), lr=0.1)
    truth = last_hypergradient(observe(make(), expected))
    found = last_hypergradient(observe(make(), Custom()))
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=0)
