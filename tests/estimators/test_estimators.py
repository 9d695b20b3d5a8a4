"""What each estimator computes: the truth over its window, or a known distortion of it."""

import math

import lightning.pytorch as pl
import pytest
import torch
from cases import (
    OPTIMIZERS,
    STEPS,
    TRAIN,
    VALID,
    Mlp,
    cosine,
    fit,
    flat,
    frozen,
    last_hypergradient,
    observe,
    train_batch,
    train_loader,
    validation_loss,
    weights,
)
from reference import central_differences, differentiate_mlp, differentiate_training
from torch import nn

from lightning_hpo import (
    T1T2,
    ClipR,
    Estimator,
    L2Mixin,
    OnlineHPOCallback,
    UnrollK,
    named_hyperparameters,
)

STATEFUL = pytest.mark.parametrize("optimizer", ["momentum", "adam"])
BOTH_MODES = pytest.mark.parametrize("mode", ["forward", "reverse"])
BOTH_WAYS = pytest.mark.parametrize("inside_loss", [False, True], ids=["gradient", "loss"])

START = math.log(0.05)


def reference(optimizer, steps, *, batch=train_batch, granularity="layer", **options):
    kind, settings = OPTIMIZERS[optimizer]
    return differentiate_mlp(
        Mlp(optimizer, granularity=granularity),
        batch,
        VALID,
        steps=steps,
        optimizer=kind,
        options=settings,
        schedule=cosine,
        **options,
    ).hypergradients


def series(callback):
    return torch.stack([flat(r.hypergradients.values()) for r in callback.history])


# ------------------------------------------------------------------------------------ one step only


@STATEFUL
@BOTH_WAYS
@pytest.mark.parametrize("clip", [None, 0.3])
def test_four_names_of_the_one_step_estimate(optimizer, inside_loss, clip):
    estimators = (T1T2(), UnrollK(1, "forward"), UnrollK(1, "reverse"), ClipR(math.inf, decay=0))
    first, *others = (
        series(observe(e, Mlp(optimizer, inside_loss=inside_loss), gradient_clip_val=clip))
        for e in estimators
    )
    assert first.shape == (STEPS, 2)
    assert first.abs().min() > 0
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-15)


@STATEFUL
def test_the_one_step_estimate_is_the_derivative_of_one_step(optimizer):
    result = last_hypergradient(observe(T1T2(), Mlp(optimizer)))
    truth = flat(reference(optimizer, STEPS, start=STEPS - 1).values())
    torch.testing.assert_close(result, truth, rtol=1e-8, atol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("clip", [None, 0.05])
@BOTH_WAYS
def test_without_the_learning_rate_it_is_a_product_of_gradients(optimizer, clip, inside_loss):
    """−⟨g_V(θ_{t+1}), ∂g_T/∂λ(θ_t)⟩, and ∂g_T/∂(log λ) of a weight is λ w."""

    def after(steps):
        model = Mlp(optimizer)
        fit(model, steps=steps, gradient_clip_val=clip)
        return model

    model = Mlp(optimizer, inside_loss=inside_loss)
    callback = observe(T1T2(scale_by_lr=False), model, gradient_clip_val=clip)
    before, last = after(STEPS - 1), after(STEPS)
    last.loss(VALID).backward()
    truth = [
        -(layer.weight.grad * 0.05 * old.weight).sum()
        for layer, old in ((last.net[0], before.net[0]), (last.net[2], before.net[2]))
    ]
    torch.testing.assert_close(
        last_hypergradient(callback), torch.stack(truth).detach(), rtol=1e-9, atol=0
    )


class Quadratic(L2Mixin, pl.LightningModule):
    """½ (θ − c)ᵀ A (θ − c) on the training data, ½ ‖θ − d‖² on the held-out ones."""

    def __init__(self, curvature, momentum=0.0, granularity="parameter", optimizer="SGD"):
        super().__init__()
        self.first = nn.Parameter(torch.tensor([2.0, -1.0]))
        self.second = nn.Parameter(torch.tensor([0.5, 3.0]))
        self.curvature = torch.as_tensor(curvature)
        self.c, self.d = torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.tensor([0.0, 1.0, 0.5, 1.0])
        self.momentum = momentum
        self.register_l2(init=0.1, granularity=granularity)

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.curvature * (torch.cat([self.first, self.second]) - self.c) ** 2).sum()

    def validation_step(self, batch, batch_idx):
        return 0.5 * (torch.cat([self.first, self.second]) - self.d).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum)

    def reference(self, steps):
        return differentiate_training(
            lambda theta, raw, t: (
                0.5 * (self.curvature * (torch.cat([*theta.values()]) - self.c) ** 2).sum()
                + sum(
                    0.5 * r.exp() * p.square().sum()
                    for r, p in zip(raw.values(), theta.values(), strict=True)
                )
            ),
            lambda theta: 0.5 * (torch.cat([*theta.values()]) - self.d).square().sum(),
            dict(self.named_parameters()),
            {n: torch.tensor(math.log(0.1)) for n in ("first", "second")},
            steps=steps,
            optimizer=torch.optim.SGD,
            options={"lr": 0.1, "momentum": self.momentum},
        )


def ratios_of_one_step_to_the_truth(curvature):
    """Trains to convergence; returns T1T2 over the total derivative, one ratio per λ."""
    truth = flat(Quadratic(curvature).reference(150).hypergradients.values())
    callback = observe(T1T2(), Quadratic(curvature), steps=150, every_n_steps=150)
    return last_hypergradient(callback) / truth


def test_one_step_is_proportional_to_the_truth_under_an_isotropic_hessian():
    """By η (a + λ) at convergence: the geometric series of all earlier steps."""
    ratios = ratios_of_one_step_to_the_truth([2.0] * 4)
    torch.testing.assert_close(ratios, torch.full((2,), 0.1 * 2.1), rtol=1e-8, atol=0)


def test_one_step_is_not_proportional_to_the_truth_otherwise():
    ratios = ratios_of_one_step_to_the_truth([1.0, 4.0, 0.5, 2.0])
    assert (ratios[0] / ratios[1] - 1).abs() > 0.3


@STATEFUL
def test_one_step_differs_from_the_truth_on_a_network(optimizer):
    truth = flat(reference(optimizer, STEPS).values())
    result = last_hypergradient(observe(T1T2(), Mlp(optimizer)))
    cosine_similarity = (result @ truth / result.norm() / truth.norm()).item()
    assert cosine_similarity < 0.999
    assert (result - truth).norm() > 0.5 * truth.norm()


# -------------------------------------------------------------------------------------------- ClipR


def hand_made_tangents(model, radius, steps, scale_state=True):
    """The recursion of (y, ẏ of the momentum buffer) under the projection, for one λ over all."""
    theta, buffer = torch.cat([model.first, model.second]).detach(), 0.0
    y, b = torch.zeros(4), torch.zeros(4)
    results, norms = [], []
    for t in range(steps):
        g_dot = (model.curvature + 0.1) * y + 0.1 * theta
        g = model.curvature * (theta - model.c) + 0.1 * theta
        buffer = g if t == 0 else 0.9 * buffer + g
        b = g_dot if t == 0 else 0.9 * b + g_dot
        theta, y = theta - 0.1 * buffer, y - 0.1 * b
        factor = radius / max(y.norm().item(), radius)
        y = factor * y
        b = factor * b if scale_state else b
        results.append((theta - model.d) @ y)
        norms.append(y.norm())
    return torch.stack(results), torch.stack(norms)


def test_the_projection_scales_the_tangents_of_the_optimizer_along():
    curvature, radius = torch.tensor([1.0, 4.0, 0.5, 2.0]), 0.1
    model = Quadratic(curvature, momentum=0.9, granularity="model")
    truth, norms = hand_made_tangents(model, radius, STEPS)
    half_way, _ = hand_made_tangents(model, radius, STEPS, scale_state=False)
    callback = observe(ClipR(radius), model)
    torch.testing.assert_close(series(callback)[:, 0], truth, rtol=1e-10, atol=1e-14)
    logged = torch.tensor([r.tangent_norms["l2"] for r in callback.history])
    torch.testing.assert_close(logged, norms, rtol=1e-10, atol=1e-14)
    # Projecting θ's tangent alone is another estimator.
    assert not torch.allclose(truth, half_way, rtol=1e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tangents_stay_within_the_radius(optimizer):
    def norms(radius):
        history = observe(ClipR(radius), Mlp(optimizer)).history
        return torch.tensor([list(r.tangent_norms.values()) for r in history])

    free = norms(math.inf)
    radius = free.max().item() / 3
    clipped = norms(radius)
    assert (free > radius).any()
    assert clipped.max().item() == pytest.approx(radius, rel=1e-12)
    # One λ whose tangent is short is not shortened by another's: they are clipped one by one.
    short = free[0] < radius
    assert short.any()
    torch.testing.assert_close(clipped[0][short], free[0][short], rtol=1e-12, atol=0)


@STATEFUL
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_decay_forgets_at_every_step(optimizer, decay):
    callback = observe(ClipR(math.inf, decay), Mlp(optimizer))
    truth = flat(reference(optimizer, STEPS, decay=decay).values())
    torch.testing.assert_close(last_hypergradient(callback), truth, rtol=1e-8, atol=0)


def test_updates_do_not_disturb_the_tangents():
    """Tangents are kept between λ updates, whether there are many of these or few."""
    often = observe(ClipR(math.inf), Mlp("adam"))
    seldom = observe(ClipR(math.inf), Mlp("adam"), every_n_steps=STEPS)
    assert [r.step for r in seldom.history] == [STEPS]
    torch.testing.assert_close(
        last_hypergradient(seldom), last_hypergradient(often), rtol=1e-12, atol=0
    )


# ------------------------------------------------------------------------------------------ UnrollK


@pytest.mark.parametrize(
    ("granularity", "k", "forward"),
    [("model", 1, False), ("model", 2, True), ("layer", 2, False), ("layer", 3, True)],
)
def test_the_automatic_mode_is_forward_iff_there_are_fewer_hyperparameters_than_steps(
    granularity, k, forward
):
    callback = observe(UnrollK(k), Mlp(granularity=granularity), steps=2 * k)
    # Only forward mode has tangents whose norm could be reported.
    assert len(callback.history) == 2
    assert all((r.tangent_norms is not None) == forward for r in callback.history)


@STATEFUL
@BOTH_MODES
def test_a_window_forgets_what_came_before_it(optimizer, mode):
    history = observe(UnrollK(5, mode), Mlp(optimizer)).history
    assert [r.step for r in history] == [5, 10]
    first, second = (r.hypergradients for r in history)
    torch.testing.assert_close(first, reference(optimizer, 5), rtol=1e-8, atol=0)
    torch.testing.assert_close(second, reference(optimizer, 10, start=5), rtol=1e-8, atol=0)
    whole = flat(reference(optimizer, 10).values())
    assert not torch.allclose(flat(second.values()), whole, rtol=1e-2)


@STATEFUL
@BOTH_MODES
def test_only_the_last_steps_before_an_update_are_observed(optimizer, mode):
    replays = []

    class Counting(Mlp):
        def training_step(self, batch, batch_idx):
            if "log" in vars(self):  # muted: this is a replay
                replays.append((self.trainer.global_step, batch_idx))
            return super().training_step(batch, batch_idx)

    callback = observe(UnrollK(3, mode), Counting(optimizer), every_n_steps=5)
    for record, steps in zip(callback.history, (5, 10), strict=True):
        truth = reference(optimizer, steps, start=steps - 3)
        assert record.step == steps
        torch.testing.assert_close(record.hypergradients, truth, rtol=1e-8, atol=0)
    # Those of the first step find out what may be relied on. A window's first step needs no product
    # with the Hessian: before it θ does not depend on λ.
    observed = sorted({step for step, _ in replays if step > 0})
    assert observed == [3, 4, 8, 9]


@BOTH_MODES
@pytest.mark.parametrize("k", [2, 5])
def test_warm_up_delays_the_first_window(mode, k):
    callback = observe(UnrollK(k, mode), Mlp("momentum"), warmup_steps=3)
    assert callback.history[0].step == (4 if k == 2 else 5)
    first = callback.history[0]
    truth = reference("momentum", first.step, start=first.step - k)
    torch.testing.assert_close(first.hypergradients, truth, rtol=1e-8, atol=0)


# ---------------------------------------------------------------------------- gradient accumulation

ACCUMULATING = {
    "RTHO": lambda: ClipR(math.inf),
    "forward": lambda: UnrollK(6, "forward"),
    "reverse": lambda: UnrollK(6, "reverse"),
}


@pytest.mark.parametrize("make", ACCUMULATING.values(), ids=ACCUMULATING)
@STATEFUL
@pytest.mark.parametrize("clip", [None, 0.3])
def test_accumulated_gradients(make, optimizer, clip):
    """Five micro-batches an epoch, two a step: the last step of an epoch sees one, divided by 2."""

    def window(t):
        first = t % 3 * 16
        return [part[first : first + 16] for part in TRAIN]

    kind, settings = OPTIMIZERS[optimizer]
    model = Mlp(optimizer)
    net = model.net

    def loss(theta, raw, t):
        x, y = window(t)
        out = torch.func.functional_call(net, theta, (x,))
        data = nn.functional.cross_entropy(out, y, reduction="sum") / 16
        return data + sum(
            0.5 * r.exp() * theta[f"{layer}.weight"].square().sum() for layer, r in raw.items()
        )

    truth = differentiate_training(
        loss,
        lambda theta: nn.functional.cross_entropy(
            torch.func.functional_call(net, theta, (VALID[0],)), VALID[1]
        ),
        dict(net.named_parameters()),
        {layer: torch.tensor(math.log(0.05)) for layer in ("0", "2")},
        steps=6,
        optimizer=kind,
        options=settings,
        schedule=cosine,
        gradient_clip_val=clip,
    )
    callback = observe(make(), model, steps=6, accumulate_grad_batches=2, gradient_clip_val=clip)
    torch.testing.assert_close(weights(model), flat(truth.theta.values()), rtol=1e-10, atol=1e-12)
    assert callback.history[-1].step == 6
    torch.testing.assert_close(
        last_hypergradient(callback), flat(truth.hypergradients.values()), rtol=1e-8, atol=0
    )


def test_decay_acts_once_per_optimizer_step():
    """Whether a batch arrives whole or in two halves does not matter."""
    whole = observe(ClipR(0.5, decay=0.7), Mlp("momentum"), steps=6)
    halves = observe(
        ClipR(0.5, decay=0.7),
        Mlp("momentum"),
        steps=6,
        train=train_loader(batch_size=4),
        accumulate_grad_batches=2,
    )
    torch.testing.assert_close(series(halves), series(whole), rtol=1e-9, atol=1e-14)


# ------------------------------------------------------------------------ parameters of every shape


class ScalarAndIdle(Mlp):
    """Has a temperature of no dimensions, a frozen layer, and a parameter that takes no part."""

    def __init__(self, optimizer, temperature=True):
        super().__init__(optimizer)
        self.temperature = nn.Parameter(torch.tensor(0.3)) if temperature else 0.3
        self.idle = nn.Parameter(torch.ones(3))
        self.net[0].bias.requires_grad_(False)

    def loss(self, batch):
        x, y = batch
        factor = self.temperature.exp() if isinstance(self.temperature, nn.Parameter) else 1.35
        return nn.functional.cross_entropy(self.net(x) * factor, y)


@pytest.mark.parametrize("temperature", [False, True], ids=["without-scalar", "with-scalar"])
@pytest.mark.parametrize("clip", [None, 0.3])
@STATEFUL
def test_scalar_frozen_and_unused_parameters(temperature, clip, optimizer):
    def trained(raw):
        model = ScalarAndIdle(optimizer, temperature)
        model.l2.net._modules["0"].raw.fill_(raw)
        fit(model, gradient_clip_val=clip)
        with torch.no_grad():
            return model.loss(VALID).item()

    start, h = math.log(0.05), 1e-4
    truth = (trained(start + h) - trained(start - h)) / (2 * h)
    for make in (lambda: ClipR(math.inf), lambda: UnrollK(STEPS, "reverse")):
        model = ScalarAndIdle(optimizer, temperature)
        callback = observe(make(), model, gradient_clip_val=clip)
        result = callback.history[-1].hypergradients["l2.net.0"].item()
        assert result == pytest.approx(truth, rel=1e-5)


class Alternating(Mlp):
    """Has a branch that trains on every other batch only: its gradient is None in between."""

    def __init__(self, optimizer, raw=(START,) * 3):
        super().__init__(optimizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.branch = nn.Linear(4, 3)
        self.register_l2(init=0.05, name="own", parameters=["branch.weight"])
        for h, value in zip(named_hyperparameters(self).values(), raw, strict=True):
            h.raw.fill_(value)

    def loss(self, batch, whole=True):
        out = self.net(batch[0])
        return nn.functional.cross_entropy(out + self.branch(batch[0]) if whole else out, batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch, whole=batch_idx % 2 == 0)


@STATEFUL
def test_a_weight_that_trains_now_and_then(optimizer):
    """Where it has no gradient, neither it, its penalty nor its tangent moves."""

    def trained(raw):
        model = Alternating(optimizer, raw)
        fit(model)
        return validation_loss(model)

    truth = central_differences(trained, [START] * 3)
    for make in (lambda: ClipR(math.inf), lambda: UnrollK(STEPS, "reverse")):
        result = last_hypergradient(observe(make(), Alternating(optimizer)))
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [T1T2, lambda: T1T2(scale_by_lr=False)], ids=["T1T2", "gTgV"])
def test_one_step_without_a_gradient_has_no_effect(make):
    """The batches of an epoch are numbered 0 to 4; the branch trains on 0, 2 and 4."""
    own = [r.hypergradients["own"] for r in observe(make(), Alternating("sgd")).history]
    assert [bool(h != 0) for h in own] == [True, False, True, False, True] * 2


# ------------------------------------------------------------------------------ the common contract

ALL = {
    "T1T2": T1T2,
    "gTgV": lambda: T1T2(scale_by_lr=False),
    "forward": lambda: UnrollK(3, "forward"),
    "reverse": lambda: UnrollK(3, "reverse"),
    "ClipR": ClipR,
}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_an_estimator_can_be_used_for_a_second_training(make):
    """Nothing of an earlier training is left in it."""
    estimator: Estimator = make()
    callback = OnlineHPOCallback(estimator, optimizer=frozen)
    histories = []
    for _ in range(2):
        fit(Mlp("adam", inside_loss=True), callback, steps=7)
        histories.append(series(callback))
    assert torch.equal(*histories)


@pytest.mark.parametrize("make", ACCUMULATING.values(), ids=ACCUMULATING)
def test_a_loader_of_unequal_batches(make):
    """The last batch of an epoch is smaller."""

    def batch(t):
        start = t % 3 * 15
        return [part[start : start + 15] for part in TRAIN]

    model = Mlp("adam", inside_loss=True)
    callback = observe(make(), model, train=train_loader(batch_size=15), steps=6)
    truth = flat(reference("adam", 6, batch=batch).values())
    torch.testing.assert_close(last_hypergradient(callback), truth, rtol=1e-8, atol=0)
