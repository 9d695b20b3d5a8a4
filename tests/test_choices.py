"""Choices: drawn for each batch, and learned by policy gradients that are right in the mean."""

import copy
import itertools
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from cases import (
    EachRank,
    MemoryLogger,
    Mlp,
    Recorder,
    frozen,
    make_trainer,
    train_loader,
    valid_loader,
    weights,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_hpo import (
    T1T2,
    BernoulliHyperparameter,
    CategoricalHyperparameter,
    ClipR,
    Implicit,
    IndependentController,
    L2Mixin,
    LSTMController,
    OnlineHPOCallback,
    PolicyGradient,
    UnrollK,
    fixed_values,
    freeze,
    named_hyperparameters,
)
from lightning_hpo.choices import Choices
from lightning_hpo.hyperparameters import controller as controller_module

# ----------------------------------------------------------------------- a problem to be enumerated

START = torch.tensor([0.2, 0.1, -0.4], dtype=torch.float64)
CURVATURE = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
# What training wants under each choice; the validation wants something else, and the first choice.
TARGETS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TRUTH = torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64)
FACTORS = torch.tensor([0.9, 1.4, 0.8, 1.0], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
RATE = 0.1


def training_loss(theta, choice):
    return 0.5 * (CURVATURE * (theta - TARGETS[choice]).square()).sum()


def validation_loss(theta, choice):
    """Is linear in θ, so that the derivative of what steps do to it is exact at any rate."""
    return FACTORS[choice] * (2 + (TRUTH * theta).sum())


class Quadratic(pl.LightningModule):
    """Every window starts at the same θ, so that each update is a draw of the same estimate."""

    def __init__(self, start=START, rate=RATE):
        super().__init__()
        self.theta = nn.Parameter(start.clone())
        self.choice = CategoricalHyperparameter(range(4), LOGITS.clone())
        self.start, self.rate = start, rate

    def training_step(self, batch, batch_idx):
        return training_loss(self.theta, self.choice())

    def validation_step(self, batch, batch_idx):
        return validation_loss(self.theta, self.choice())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Returns(Quadratic):
    def on_train_batch_end(self, *_):
        self.theta.data.copy_(self.start)


def estimates(model, estimator, steps, name="choice", **options):
    """Returns the estimates of a training in which λ stands still, one row for each update."""
    callback = OnlineHPOCallback(
        estimator, optimizer=frozen, dataloader=[torch.zeros(1)], seed=1, **options
    )
    trainer = make_trainer(steps, callbacks=callback)
    trainer.fit(model, DataLoader(torch.zeros(steps)))
    return torch.stack([record.hypergradients[name].flatten() for record in callback.history])


def expected_loss(logits, window, *, response=True):
    """Returns E[L_V] at the end of a window of whole trainings, over all paths of choices.

    Without the response, of trainings under other logits, which stand still.
    """
    p = logits.softmax(0)
    trained = p if response else LOGITS.softmax(0)
    total = 0.0
    for path in itertools.product(range(4), repeat=window):
        theta, weight = START, 1.0
        for a in path:
            theta = theta - RATE * CURVATURE * (theta - TARGETS[a])
            weight = weight * trained[a]
        total = total + weight * sum(p[a] * validation_loss(theta, a) for a in range(4))
    return total


def differences(loss, at, width=1e-5):
    """Takes central differences over φ."""
    rows = width * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(loss(at + e) - loss(at - e)) / (2 * width) for e in rows])


def deviations(samples, truth):
    """Returns by how many standard errors a mean is off."""
    return ((samples.mean(0) - truth) / (samples.std(0) / len(samples) ** 0.5)).abs()


WINDOWS = {
    "T1T2": (lambda: T1T2(), 1, Returns),
    "UnrollK": (lambda: UnrollK(2, "reverse", restart=True), 2, Quadratic),
    "forward": (lambda: UnrollK(2, "forward", restart=True), 2, Quadratic),
}


@pytest.mark.parametrize(
    ("case", "baseline"),
    [
        ("T1T2", "average"),
        ("T1T2", "leave_one_out"),
        ("T1T2", "none"),
        ("UnrollK", "average"),
        ("forward", "leave_one_out"),
    ],
)
def test_the_mean_is_the_derivative_of_the_expected_loss(case, baseline):
    make, window, module = WINDOWS[case]
    exact = differences(lambda phi: expected_loss(phi, window), LOGITS)
    policy = PolicyGradient(make(), baseline=baseline, enumerate_up_to=0)
    found = estimates(module(), policy, 80 * window)
    assert deviations(found, exact).max() < 3

    # An exact direct gradient leaves only the noise of the response, which is small: it shows that
    # without the response the mean is another.
    direct = differences(lambda phi: expected_loss(phi, window, response=False), LOGITS)
    if baseline != "none":
        found = estimates(module(), PolicyGradient(make(), baseline=baseline), 40 * window)
        assert deviations(found, exact).max() < 3
        assert deviations(found, direct).max() > 6
    plain = estimates(module(), PolicyGradient(make(), response=False), 2 * window)
    assert (plain[0] - exact).abs().max() > 0.5 * (exact - direct).abs().max()


def force(monkeypatch, paths):
    """Lets trainings go through paths of choices: for each batch, the index of each, by name."""
    batches = [choices for path in paths for choices in path]

    def draw(self, batch, window):
        for name, index in batches[batch].items():
            self[name].drawn, self[name].was_asked = index, False

    monkeypatch.setattr(Choices, "draw", draw)


LONGER = {"UnrollK(3)": (lambda: UnrollK(3, "reverse", restart=True), 3, Quadratic)}


@pytest.mark.parametrize("case", [*WINDOWS, *LONGER])
def test_the_mean_over_all_paths_is_exact(case, monkeypatch):
    make, window, module = {**WINDOWS, **LONGER}[case]
    exact = differences(lambda phi: expected_loss(phi, window), LOGITS)
    paths = list(itertools.product(range(4), repeat=window))
    force(monkeypatch, [[{"choice": a} for a in path] for path in paths])
    found = estimates(module(), PolicyGradient(make(), baseline="none"), len(paths) * window)
    p = LOGITS.softmax(0)
    weights = torch.stack([p[list(path)].prod() for path in paths])
    assert torch.allclose(weights @ found, exact, rtol=1e-6, atol=1e-9)


class Normalized(Quadratic):
    """What is normalized depends on the choice, and the held-out loss on the running mean."""

    MOMENTUM = 0.3
    INPUTS = torch.tensor([[1.0, -2.0, 0.5], [2.0, 0.5, 1.0]], dtype=torch.float64)

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=self.MOMENTUM, affine=False)

    def training_step(self, batch, batch_idx):
        choice = self.choice()
        self.norm(FACTORS[choice] * self.INPUTS + self.theta)
        return training_loss(self.theta, choice)

    def validation_step(self, batch, batch_idx):
        return 2 + (TRUTH * (self.norm.running_mean + self.theta)).sum()

    @classmethod
    def expected(cls, logits, window):
        p, total = logits.softmax(0), 0.0
        for path in itertools.product(range(4), repeat=window):
            theta, mean, weight = START, torch.zeros_like(START), 1.0
            for a in path:
                inputs = (FACTORS[a] * cls.INPUTS + theta).mean(0)
                mean = (1 - cls.MOMENTUM) * mean + cls.MOMENTUM * inputs
                theta = theta - RATE * CURVATURE * (theta - TARGETS[a])
                weight = weight * p[a]
            total = total + weight * (2 + (TRUTH * (mean + theta)).sum())
        return total


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_running_statistics_respond_to_choices(mode, monkeypatch):
    exact = differences(lambda phi: Normalized.expected(phi, 2), LOGITS)
    paths = list(itertools.product(range(4), repeat=2))
    force(monkeypatch, [[{"choice": a} for a in path] for path in paths])
    policy = PolicyGradient(UnrollK(2, mode, restart=True), baseline="none")
    found = estimates(Normalized(), policy, 2 * len(paths))
    p = LOGITS.softmax(0)
    weights = torch.stack([p[list(path)].prod() for path in paths])
    assert torch.allclose(weights @ found, exact, rtol=1e-5, atol=1e-9)


# How strongly training pulls differs between choices as well.
STRENGTHS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)


class Stationary(Quadratic):
    """It stays where the mean gradient vanishes; the step of the Neumann series is another rate."""

    RATE = 0.3

    def __init__(self):
        super().__init__(stationary(LOGITS))
        self.other = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return STRENGTHS[self.choice()] * super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        groups = [{"params": [self.other], "lr": self.RATE}, {"params": [self.theta]}]
        return torch.optim.SGD(groups, lr=1e-12)


def stationary(logits):
    """Returns where the expected gradient vanishes."""
    pull = logits.softmax(0) * STRENGTHS
    return pull @ TARGETS / pull.sum()


def stationary_loss(logits, *, response=True):
    theta = stationary(logits if response else LOGITS)
    p = logits.softmax(0)
    return sum(p[a] * validation_loss(theta, a) for a in range(4))


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_implicit(solver):
    exact = differences(stationary_loss, LOGITS)
    policy = PolicyGradient(Implicit(solver, iterations=200, tolerance=1e-10))
    found = estimates(Stationary(), policy, 2)
    assert torch.allclose(found[0], exact, rtol=1e-6)
    direct = differences(lambda phi: stationary_loss(phi, response=False), LOGITS)
    plain = estimates(Stationary(), PolicyGradient(Implicit(solver), response=False), 2)
    assert torch.allclose(plain[0], direct, rtol=1e-6)
    assert (exact - direct).abs().max() > 0.1


def test_a_neumann_series_draws_choices_anew_for_each_term(monkeypatch):
    class Plain(Stationary):
        """Its held-out loss depends on no choice: all is response."""

        def validation_step(self, batch, batch_idx):
            return validation_loss(self.theta, 0)

    paths = list(itertools.product(range(4), repeat=3))  # of the step, and of two terms
    force(monkeypatch, [[{"choice": a}] for a, _, _ in paths])
    sample = Choices.sample

    def forced(self, *place):
        if place[0] != "implicit":
            return sample(self, *place)
        update, term = divmod(place[1], 2)
        return {"choice": paths[update][1 + term]}

    monkeypatch.setattr(Choices, "sample", forced)
    policy = PolicyGradient(
        Implicit("neumann", iterations=2), enumerate_up_to=3, baseline="none", samples=1
    )
    found = estimates(Plain(), policy, len(paths))
    p = LOGITS.softmax(0)
    mean = torch.stack([p[list(path)].prod() for path in paths]) @ found

    term = total = FACTORS[0] * TRUTH
    for _ in range(2):
        term = term - Stationary.RATE * (p @ STRENGTHS) * CURVATURE * term
        total = total + term
    pull = STRENGTHS[:, None] * CURVATURE * (stationary(LOGITS) - TARGETS)
    score = torch.eye(4, dtype=p.dtype) - p
    exact = -Stationary.RATE * (p * (pull @ total)) @ score
    assert torch.allclose(mean, exact, rtol=1e-6)


def test_conjugate_gradients_need_all_choices():
    with pytest.raises(MisconfigurationException, match=r"mean of the Hessian over all 4 comb"):
        estimates(Stationary(), PolicyGradient(Implicit(), enumerate_up_to=3), 1)


def test_baselines_take_variance_away():
    def variance(**options):
        policy = PolicyGradient(response=False, enumerate_up_to=0, samples=2, **options)
        return estimates(Returns(rate=1e-9), policy, 80)[20:].var(0).sum()

    none = variance(baseline="none")
    assert variance(baseline="average") < 0.2 * none
    assert variance(baseline="leave_one_out") < 0.3 * none
    exact = estimates(Returns(rate=1e-9), PolicyGradient(response=False), 10)
    assert exact.var(0).sum() < 1e-6 * none


class Joint(L2Mixin, pl.LightningModule):
    """Choices of the network and of the learning rate, under momentum and a penalty."""

    RATES = (0.02, 0.2)
    MOMENTUM = 0.9
    STRENGTH = 0.3

    def __init__(self, controller, reverse=False):
        super().__init__()
        self.theta = nn.Parameter(START.clone())
        self.which = CategoricalHyperparameter(range(2), LOGITS[:2].clone())
        self.lr = CategoricalHyperparameter(self.RATES, LOGITS[2:].clone())
        self.register_l2(init=self.STRENGTH)
        for h in named_hyperparameters(self).values():
            h.frozen = not isinstance(h, CategoricalHyperparameter)
        self.names = ["which", "optimizer.lr"]
        if controller:
            network, options = {"which": self.which}, {"lr": self.lr}
            if reverse:  # the learning rate is decided first
                network, options = {"optimizer.lr": self.lr, **network}, {}
            self.controller = LSTMController(network, options, hidden=3)
            spread_(self.controller)
            self.names = ["controller.weights"]

    def training_step(self, batch, batch_idx):
        return training_loss(self.theta, self.which())

    def validation_step(self, batch, batch_idx):
        return validation_loss(self.theta, self.which())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=self.MOMENTUM)

    def policy(self):
        own = [self.which, self.lr]
        return [self.controller.weights] if hasattr(self, "controller") else own

    def probabilities(self, phi):
        """Returns p of every (which, lr)."""
        sizes = [h.raw.numel() for h in self.policy()]
        parts = zip(self.policy(), phi.split(sizes), strict=True)
        raws = {h: part.reshape(h.raw.shape) for h, part in parts}
        found = {}
        for path in itertools.product(range(2), repeat=2):
            known = dict(zip(("which", "optimizer.lr"), path, strict=True))
            if hasattr(self, "controller"):
                log_p = self.controller.walk(raws, lambda name, _, known=known: known[name])
            else:
                hs = zip(known, self.policy(), strict=True)
                log_p = {name: h.distribution(raws[h]).logits for name, h in hs}
            found[path] = sum(log_p[name][i] for name, i in known.items()).exp()
        return found

    def expected(self, phi, window):
        """Returns E[L_V] after whole trainings, over all paths of choices."""
        p = self.probabilities(phi)
        total = 0.0
        for path in itertools.product(p, repeat=window):
            theta, buffer = START, 0.0
            for which, lr in path:
                gradient = CURVATURE * (theta - TARGETS[which]) + self.STRENGTH * theta
                buffer = self.MOMENTUM * buffer + gradient
                theta = theta - self.RATES[lr] * buffer
            loss = sum(q * validation_loss(theta, which) for (which, _), q in p.items())
            total = total + math.prod(p[a] for a in path) * loss
        return total


def spread_(controller, scale=0.5):
    """Makes what a network decides depend on what it has decided before."""
    raw = controller.weights.raw
    noise = torch.Generator().manual_seed(1)
    raw += scale * torch.randn(raw.shape, generator=noise, dtype=raw.dtype)
    controller.show()


def means(model, estimator, window, monkeypatch, **options):
    """Returns the mean of an estimate over all paths of choices, each of which is gone once."""
    paths = list(itertools.product(itertools.product(range(2), repeat=2), repeat=window))
    named = [[{"which": which, "optimizer.lr": lr} for which, lr in path] for path in paths]
    force(monkeypatch, named)
    p = model.probabilities(torch.cat([h.raw.flatten() for h in model.policy()]))
    callback = OnlineHPOCallback(
        estimator,
        optimizer=frozen,
        dataloader=[torch.zeros(1)],
        optimizer_hyperparameters={"lr": model.lr},
    )
    steps = len(paths) * window
    make_trainer(steps, callbacks=callback, **options).fit(model, DataLoader(torch.zeros(steps)))
    weights = torch.stack([torch.stack([p[a] for a in path]).prod() for path in paths])
    rows = [
        torch.cat([r.hypergradients[n].flatten() for n in model.names]) for r in callback.history
    ]
    return weights @ torch.stack(rows)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("controller", ["independent", "LSTM", "LSTM, learning rate first"])
def test_choices_of_network_and_optimizer(controller, mode, monkeypatch):
    model = Joint(controller != "independent", reverse="first" in controller)
    window = 2 if mode == "reverse" else 1
    phi = torch.cat([h.raw.flatten() for h in model.policy()])
    exact = differences(lambda at: model.expected(at, window), phi)
    policy = PolicyGradient(UnrollK(window, mode, restart=True), baseline="none")
    found = means(model, policy, window, monkeypatch)
    assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6 * exact.abs().max())


class Decided(Quadratic):
    """Two choices that a network decides; θ stands still."""

    def __init__(self):
        super().__init__(rate=0.0)
        self.choice = CategoricalHyperparameter(range(3))
        self.skip = BernoulliHyperparameter(0.3)
        decisions = {"choice": self.choice, "skip": self.skip}
        self.controller = LSTMController(decisions, hidden=3)
        spread_(self.controller, 1.0)

    def training_step(self, batch, batch_idx):
        return training_loss(self.theta, self.choice() + self.skip())

    def validation_step(self, batch, batch_idx):
        return validation_loss(self.theta, self.choice() + self.skip())

    def log_p(self, phi, choice, skip):
        known = {"choice": choice, "skip": int(skip)}
        found = self.controller.walk({self.controller.weights: phi}, lambda name, _: known[name])
        return sum(found[name][i] for name, i in known.items())

    def expected(self, phi, value):
        """Returns the mean of a value of (choice, skip) over what is not frozen."""
        paths = [
            (choice, skip)
            for choice in ([self.choice()] if self.choice.frozen else range(3))
            for skip in range(2)
        ]
        return sum(self.log_p(phi, *path).exp() * value(*path) for path in paths)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["all", "one frozen"])
def test_the_direct_gradient_of_a_network(is_frozen):
    model = Decided()
    if is_frozen:
        freeze(model, {"choice": 1})
    exact = differences(
        lambda phi: model.expected(phi, lambda choice, skip: validation_loss(START, choice + skip)),
        model.controller.weights.raw.clone(),
    )
    found = estimates(model, PolicyGradient(response=False), 1, "controller.weights")
    assert torch.allclose(found[0], exact, rtol=1e-6, atol=1e-9)


def test_the_entropy_of_a_network():
    model = Decided()
    phi = model.controller.weights.raw.clone()
    leaf = phi.clone().requires_grad_()
    entropy = -model.expected(leaf, lambda *path: model.log_p(leaf, *path))
    (exact,) = torch.autograd.grad(entropy, leaf)

    def run(entropy):
        policy = PolicyGradient(response=False, entropy=entropy)
        return estimates(Decided(), policy, 1, "controller.weights")[0]

    found = run(0.0) - run(2.0)
    assert torch.allclose(found, 2 * exact, rtol=1e-6, atol=1e-9)

    choices = Choices(model, {"choice": model.choice, "skip": model.skip}, 0)
    paths = [{"choice": c, "skip": s} for c in range(3) for s in range(2)]
    p = [float(model.log_p(phi, *path.values()).exp()) for path in paths]
    for n in (1, 2):
        mean = torch.zeros_like(phi)
        for drawn in itertools.product(range(6), repeat=n):
            slope = choices.entropy_slope(
                [model.controller.weights], [paths[i] for i in drawn], enumerate_up_to=5
            )
            mean += math.prod(p[i] for i in drawn) * slope[0]
        assert torch.allclose(mean, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("is_small", [True, False], ids=["all", "single changes"])
def test_the_best_choice_of_a_network(is_small, monkeypatch):
    if not is_small:
        monkeypatch.setattr(controller_module, "_ENUMERATED", 5)
    differs = 0
    for seed in range(30):
        a, b = CategoricalHyperparameter(range(2)), CategoricalHyperparameter(["u", "v", "w"])
        controller = LSTMController({"a": a, "b": b}, hidden=3)
        raw = controller.weights.raw
        noise = torch.Generator().manual_seed(seed)
        raw += 2 * torch.randn(raw.shape, generator=noise, dtype=raw.dtype)
        every = controller.combinations()
        table = controller.log_probabilities({}, every).reshape(2, 3)
        assert table.exp().sum() == pytest.approx(1)
        controller.show()
        best = controller.best()
        assert best == {"a": a(), "b": b()}  # as in a validation
        i, j = a.best(), b.best()
        if is_small:
            assert table[i, j] == table.max()
        else:
            assert table[i, j] == table[i].max() == table[:, j].max()
        assert a.distribution().logits == pytest.approx(table[:, j].log_softmax(0), abs=1e-6)
        first = int(table.logsumexp(1).argmax())
        differs += (first, int(table[first].argmax())) != (i, j)
    assert differs > 0  # from what is decided one after the other


# -------------------------------------------------------------------------------- in real trainings


class Searched(Mlp):
    """A network whose activation is chosen, with L2 besides."""

    def __init__(self, logits=None):
        super().__init__()
        self.activation = CategoricalHyperparameter(["tanh", "sigmoid", "relu"], logits)
        self.net = nn.Sequential(*self.net[:1], Chosen(self.activation), *self.net[2:])


class Chosen(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        return getattr(torch, self.activation())(x)


def searched(**options):
    torch.manual_seed(1)
    return Searched(**options)


def tune(model, callback, steps=10, **options):
    trainer = make_trainer(steps, callbacks=callback, **options)
    torch.manual_seed(2)
    trainer.fit(model, train_loader(shuffle=True), valid_loader())
    return torch.rand(1)


def test_choices_beside_strengths():
    model = searched()
    callback = OnlineHPOCallback({"activation": PolicyGradient(), "*": T1T2()})
    tune(model, callback)
    record = callback.history[-1]
    assert {"activation", "l2.net.0"} <= record.values.keys()
    assert sum(record.values["activation"]) == pytest.approx(1)
    assert all(g.isfinite().all() for g in record.hypergradients.values())
    assert callback.history[0].values["activation"] != record.values["activation"]


def test_an_estimator_for_all_serves_choices_too():
    callback = OnlineHPOCallback(UnrollK(2))
    tune(searched(), callback)
    assert [(p, type(e).__name__) for p, e, _ in callback.strategy.assigned] == [
        ("*", "UnrollK"),
        ("* (choices)", "PolicyGradient"),
    ]


def test_the_default_learns_choices():
    callback = OnlineHPOCallback()
    tune(searched(), callback, 40)
    assert "PolicyGradient" in str(callback.strategy)
    assert len(callback.history) > 2


def test_invisible_but_for_the_draws():
    results = []
    for is_frozen in (False, True):
        model = searched()
        model.activation.frozen = is_frozen
        callback = OnlineHPOCallback(T1T2(), optimizer=frozen)
        after = tune(model, callback)
        results.append((weights(model), after))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])

    model = searched()
    after = tune(model, [])
    assert not torch.equal(weights(model), results[0][0])  # it has drawn
    assert torch.equal(after, results[0][1])  # from numbers of its own


def test_draws_follow_the_probabilities():
    h = CategoricalHyperparameter(["a", "b", "c"], torch.tensor([0.0, 1.0, 2.0]))
    choices = Choices(nn.Module(), {"letter": h}, seed=3)
    drawn = [choices.sample("batch", i)["letter"] for i in range(3000)]
    shares = torch.tensor(drawn).bincount() / 3000
    assert shares == pytest.approx(h.value.tolist(), abs=0.03)
    again = Choices(nn.Module(), {"letter": h}, seed=3)
    assert [again.sample("batch", i)["letter"] for i in range(50)] == drawn[:50]
    other = Choices(nn.Module(), {"letter": h}, seed=4)
    assert [other.sample("batch", i)["letter"] for i in range(50)] != drawn[:50]


def test_in_force_during_steps_alone():
    seen = Recorder()

    class Watched(Searched):
        def training_step(self, batch, batch_idx):
            seen.calls.append(("train", self.activation()))
            return super().training_step(batch, batch_idx)

    class Watch(pl.Callback):
        def __init__(self):
            self.validated = []

        def on_validation_batch_start(self, trainer, module, *_):
            self.validated.append(module.activation())

    model = searched(logits=torch.tensor([0.0, 0.0, 0.1]))
    watch = Watch()
    trainer = make_trainer(
        10, callbacks=[OnlineHPOCallback(T1T2(), optimizer=frozen), watch], limit_val_batches=1
    )
    trainer.fit(model, train_loader(), valid_loader())
    assert set(watch.validated) == {"relu"}
    assert model.activation() == "relu"
    assert model.activation.drawn is None


def test_resumes_bit_for_bit(tmp_path):
    def make():
        return OnlineHPOCallback({"act*": PolicyGradient(UnrollK(2), entropy=0.1), "*": T1T2()})

    def go(model, callback, epochs, **options):
        torch.manual_seed(2)
        trainer = make_trainer(-1, max_epochs=epochs, callbacks=callback)
        trainer.fit(model, train_loader(), valid_loader(), **options)
        return trainer

    whole, callback = searched(), make()
    go(whole, callback, 4)
    trainer = go(searched(), make(), 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, second = searched(), make()
    go(rest, second, 4, ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(weights(rest), weights(whole))
    assert str(second.history.columns()) == str(callback.history.columns())


class Trained(Quadratic):
    """Its learning rate is a choice, which may be no part of the module."""

    def __init__(self, is_part, decides, rate=0.1):
        super().__init__(rate=rate)
        lr = CategoricalHyperparameter([1e-3, 1e-2, 1e-1])
        if is_part:
            self.lr = lr
        if decides:
            self.controller = LSTMController({"choice": self.choice}, {"lr": lr}, hidden=4)
        self.options = {"lr": lr}
        self.seen = Seen()


class Seen(pl.Callback):
    def __init__(self):
        self.theta = []

    def on_train_batch_end(self, trainer, module, *_):
        self.theta.append(module.theta.detach().clone())


@pytest.mark.parametrize(
    ("is_part", "decides", "accumulated"),
    [(False, False, 1), (True, False, 2), (False, True, 1), (False, True, 2)],
)
def test_a_learning_rate_resumes_in_mid_epoch(is_part, decides, accumulated, tmp_path):
    def go(steps, **options):
        model = Trained(is_part, decides)
        callback = OnlineHPOCallback(
            PolicyGradient(UnrollK(2), entropy=0.01),
            optimizer=lambda raws: torch.optim.SGD(raws, lr=20.0),
            dataloader=[torch.zeros(1)],
            optimizer_hyperparameters=model.options,
        )
        trainer = make_trainer(
            steps, callbacks=[callback, model.seen], accumulate_grad_batches=accumulated
        )
        trainer.fit(model, DataLoader(torch.zeros(20)), **options)
        return trainer, torch.stack(model.seen.theta)

    path = str(tmp_path / "half.ckpt")
    _, whole = go(9)
    assert len(set(whole.diff(dim=0)[:, 0].tolist())) > 4
    trainer, _ = go(5)
    trainer.save_checkpoint(path)
    _, rest = go(9, ckpt_path=path)
    assert torch.equal(rest, whole[-len(rest) :])


class OnRanks(EachRank, Searched):
    pass


@pytest.mark.usefixtures("within_two_minutes")
@pytest.mark.parametrize("samples", [0, 8], ids=["drawn", "all"])
def test_two_ranks_equal_one_process_on_the_whole_batch(samples):
    def train(devices):
        model = OnRanks()
        policy = PolicyGradient(UnrollK(2), enumerate_up_to=samples)
        callback = OnlineHPOCallback(
            {"act*": policy, "*": T1T2()}, optimizer=lambda raw: torch.optim.SGD(raw, lr=1.0)
        )
        strategy = "ddp_fork" if devices > 1 else "auto"
        make_trainer(callbacks=callback, devices=devices, strategy=strategy).fit(model)
        return torch.cat([model.activation.raw, weights(model)])

    one, two = train(1), train(2)
    assert torch.allclose(two, one, rtol=1e-9, atol=1e-12)
    assert not one[:3].allclose(torch.zeros(3, dtype=one.dtype), atol=1e-3)


def test_loggers_get_probabilities_and_entropy():
    logger = MemoryLogger()
    callback = OnlineHPOCallback(T1T2())
    tune(searched(), callback, logger=logger, log_every_n_steps=1)
    metrics = {k: v for _, logged in logger.entries for k, v in logged.items()}
    names = [f"hpo/activation/{choice}" for choice in ("tanh", "sigmoid", "relu")]
    assert sum(metrics[name] for name in names) == pytest.approx(1)
    assert 1.0 < metrics["hpo/activation/entropy"] < math.log(3)
    assert "hpo/activation/mean" not in metrics
    assert "relu 0." in callback.summary()
    _, axes = callback.plot(["activation"])
    assert [text.get_text() for text in axes[0, 0].get_legend().get_texts()] == [
        "tanh",
        "sigmoid",
        "relu",
    ]


def test_an_entropy_bonus_spreads_probabilities():
    logits = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)

    def last(entropy):
        model = searched(logits=logits)
        policy = PolicyGradient(response=False, entropy=entropy)
        callback = OnlineHPOCallback(
            {"act*": policy, "*": T1T2()}, optimizer=lambda raw: torch.optim.SGD(raw, lr=0.5)
        )
        tune(model, callback)
        return float(model.activation.distribution().entropy())

    assert last(1.0) > last(0.0) + 0.1


def test_values_found_are_frozen_into_a_fresh_module():
    model = searched(logits=torch.tensor([0.0, 3.0, 0.0]))
    values = fixed_values(model)
    assert values["activation"] == "sigmoid"
    fresh = freeze(searched(), values)
    assert fresh.activation() == "sigmoid"
    assert fresh.activation.probabilities()[1] > 1 - 1e-12
    # It is drawn again and again, and always the same.
    choices = Choices(nn.Module(), {"activation": fresh.activation}, 0)
    assert {choices.sample(i)["activation"] for i in range(50)} == {1}
    with pytest.raises(ValueError, match=r"'gelu', expected one of \['tanh', 'sigmoid', 'relu'\]"):
        freeze(searched(), {"activation": "gelu"})
    copied = copy.deepcopy(model)
    assert copied.activation() == "sigmoid"


class Recorded:
    """Keeps what replays do as well."""

    def __init__(self):
        self.record = Recorder(found=[])

    @property
    def found(self):
        return self.record.found

    def append(self, value):
        self.record.found = [*self.record.found, value]


@pytest.mark.parametrize("is_whole", [True, False], ids=["all", "one"])
def test_decisions_of_a_network_that_are_frozen(is_whole):
    seen = Recorded()

    class Driven(Searched):
        def __init__(self):
            super().__init__()
            self.deep = BernoulliHyperparameter()
            decisions = {"activation": self.activation, "deep": self.deep}
            self.controller = LSTMController(decisions, hidden=4)

        def training_step(self, batch, batch_idx):
            seen.append((self.activation(), self.deep()))
            return super().training_step(batch, batch_idx) * (1.1 if self.deep() else 1.0)

    values = {"activation": "sigmoid", "deep": True}
    module = freeze(Driven(), values if is_whole else {"activation": "sigmoid"})
    module.controller.weights.frozen = is_whole
    tune(module, OnlineHPOCallback(T1T2()), 30)
    assert {activation for activation, _ in seen.found} == {"sigmoid"}
    assert {deep for _, deep in seen.found} == ({True} if is_whole else {True, False})
    assert module.controller.best()["activation"] == module.activation() == "sigmoid"


class Rates(pl.Callback):
    """Notes the learning rates that are in force."""

    def __init__(self):
        self.found = []

    def on_train_start(self, trainer, module):
        optimizer = trainer.optimizers[0]
        self.first = optimizer.param_groups[0]["lr"]
        optimizer.register_step_pre_hook(lambda o, *_: self.found.append(o.param_groups[0]["lr"]))


@pytest.mark.parametrize("is_part", [False, True], ids=["outside", "inside"])
def test_the_best_is_trained_anew_beside_strengths(is_part):
    def make():
        model = searched()
        lr = CategoricalHyperparameter([0.05, 0.2])
        model.controller = LSTMController({"activation": model.activation}, {"lr": lr}, hidden=4)
        if is_part:
            model.lr = lr
        return model, {"lr": lr}

    model, options = make()
    spread_(model.controller, 2.0)
    tune(model, OnlineHPOCallback(T1T2(), optimizer_hyperparameters=options), 4)
    best = model.controller.best()
    assert best.keys() == {"activation", "optimizer.lr"}
    fresh, options = make()
    freeze(fresh, best)
    callback, rates = OnlineHPOCallback(T1T2(), optimizer_hyperparameters=options), Rates()
    tune(fresh, [callback, rates], 4)
    # Under the schedule of the module it is a factor.
    assert rates.found[0] == pytest.approx(best["optimizer.lr"] * rates.first)
    assert fresh.activation() == best["activation"] == fresh.controller.best()["activation"]
    assert "controller.weights" not in callback.history[0].values
    assert callback.history[0].values["l2.net.0"] != callback.history[-1].values["l2.net.0"]
    with pytest.raises(ValueError, match=r"'optimizer.lr' is refused: got 0.1, expected one of"):
        freeze(make()[0], {"optimizer.lr": 0.1})


def test_a_choice_under_another_choice():
    class Nested(Searched):
        def __init__(self):
            super().__init__()
            self.deep = BernoulliHyperparameter(0.1)
            self.extra = CategoricalHyperparameter(["tanh", "relu"])

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.deep():
                loss = loss + 0.1 * getattr(torch, self.extra())(self.net[0].weight).square().sum()
            return loss

    torch.manual_seed(1)
    callback = OnlineHPOCallback(T1T2())
    tune(Nested(), callback)
    assert {"deep", "extra"} <= callback.history[-1].values.keys()


class Deep(Quadratic):
    """The activation of a layer is asked for where there are so many layers."""

    def __init__(self, depths, logits=None):
        super().__init__()
        self.depth = CategoricalHyperparameter(range(1, depths + 1), logits)
        self.layers = nn.ModuleList(CategoricalHyperparameter(["a", "b"]) for _ in range(depths))

    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch, batch_idx) * self.factor()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factor()

    def factor(self):
        return 1 + 0.1 * sum(layer() == "a" for layer in self.layers[: self.depth()])


def test_a_choice_under_a_rare_one():
    logits = torch.zeros(7)
    logits[-1] = -9.0  # drawn once in thousands of batches
    assert len(estimates(Deep(7, logits), PolicyGradient(), 2)) == 2


def test_a_choice_under_two_rare_ones():
    class Deeper(Deep):
        def __init__(self):
            super().__init__(5, torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0]))
            self.other = BernoulliHyperparameter(1e-3)
            self.inner = BernoulliHyperparameter(0.5)

        def factor(self):
            found = super().factor()
            if self.other() and self.depth() == 5:
                found = found * (2 - self.inner())
            return found

    with pytest.warns(UserWarning, match=r"not seen to ask for the choices \['inner'\]"):
        estimates(Deeper(), PolicyGradient(), 2)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["relu"],), ValueError, "expected at least two"),
        ((["a", "b", "a"],), ValueError, "has 'a' twice"),
        (("ab", torch.zeros(3)), TypeError, "expected several, in a list"),
        ((["a", "b"], torch.zeros(3)), ValueError, r"shape \(3,\), expected \(2,\)"),
        ((["a", "b"], torch.tensor([1, 2])), TypeError, "floating-point tensor"),
        ((["a", "b"], torch.tensor([0.0, math.nan])), ValueError, "not finite"),
        ((["a", "b"], torch.tensor([0.0, -math.inf])), ValueError, "not finite"),
        ((3,), TypeError, "expected several"),
        (({1, 2},), TypeError, "order differs between processes; pass a list"),
        ((frozenset("ab"),), TypeError, "order differs between processes; pass a list"),
        (([torch.zeros(2), torch.ones(2)],), TypeError, "cannot be compared .* range"),
        (([nn.Linear(1, 1), nn.Linear(1, 1)],), TypeError, r"nn.ModuleList.*range\(2\)"),
        (([math.nan, math.nan],), ValueError, "has nan twice"),
    ],
)
def test_bad_choices(arguments, error, message):
    with pytest.raises(error, match=message):
        CategoricalHyperparameter(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"estimator": ClipR()}, TypeError, r"expected T1T2\(\), UnrollK or Implicit"),
        ({"estimator": T1T2(scale_by_lr=False)}, TypeError, "or are no derivatives"),
        ({"baseline": "mean"}, ValueError, "expected one of"),
        ({"baseline": "leave_one_out", "samples": 1}, ValueError, "expected at least 2"),
        ({"samples": 0}, ValueError, "positive integer"),
        ({"entropy": -1.0}, ValueError, "finite number ≥ 0"),
        ({"response": 1}, TypeError, "True or False"),
    ],
)
def test_bad_policy_gradients(arguments, error, message):
    with pytest.raises(error, match=message):
        PolicyGradient(**arguments)


def refused(model, estimator, message, **options):
    before = weights(model).clone()
    callback = OnlineHPOCallback(estimator, **options)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        tune(model, callback)
    assert torch.equal(weights(model), before)


def test_refused_at_the_start():
    refused(searched(), ClipR(), r"ClipR cannot learn choices such as \['activation'\]")
    refused(
        searched(),
        PolicyGradient(),
        r"PolicyGradient learns choices, but \['l2.net.0', 'l2.net.2'\] are none",
    )

    model = searched()
    model.idle = CategoricalHyperparameter([1, 2])
    refused(model, T1T2(), r"choices \['idle'\] have no effect .* never asks for them")
    model.idle = CategoricalHyperparameter(range(40))  # too many to look at all combinations
    refused(model, T1T2(), r"choices \['idle'\] have no effect .* never asks for them")

    class Plain(Mlp):
        pass

    refused(Plain(), PolicyGradient(), r"are none. .* made by a CategoricalHyperparameter")

    lr = {"lr": CategoricalHyperparameter([0.1, 0.2])}
    policy = {"optimizer*": PolicyGradient(response=False), "*": T1T2()}
    message = r"cannot learn \['optimizer.lr'\]: .* Leave response=True"
    refused(Plain(), policy, message, optimizer_hyperparameters=lr)

    model = searched()
    model.controller = LSTMController(
        {"activation": model.activation}, {"lr": CategoricalHyperparameter([0.1, 0.2])}
    )
    refused(model, T1T2(), "decides 'optimizer.lr', which this training does not have")


@pytest.mark.parametrize(
    ("option", "choices", "message"),
    [
        ("lr", ["fast", "slow"], "cannot be 'fast': it is no number"),
        ("lr", [0.1, -1.0], r"cannot be -1.0: .* outside"),
        ("momentum", [0.9, 1.5], r"cannot be 1.5: .* outside"),
        ("weight_decay", [0.0, -0.1], r"cannot be -0.1: .* outside"),
    ],
)
def test_an_option_is_chosen_within_its_range(option, choices, message):
    options = {option: CategoricalHyperparameter(choices)}
    refused(Mlp("momentum"), T1T2(), message, optimizer_hyperparameters=options)


def test_a_controller_needs_a_mapping():
    with pytest.raises(TypeError, match="got a list, expected a mapping from names"):
        LSTMController([CategoricalHyperparameter([1, 2])])


def test_a_choice_with_a_loss_that_is_not_finite_is_named():
    class Broken(Quadratic):
        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            return loss * math.nan if self.choice() == 2 else loss

    model = Broken()
    callback = OnlineHPOCallback(PolicyGradient(), dataloader=[torch.zeros(1)])
    with pytest.warns(UserWarning, match=r"held-out loss is nan with choice=2; λ stays"):
        make_trainer(2, callbacks=callback).fit(model, DataLoader(torch.zeros(2)))
    assert torch.equal(model.choice.raw, LOGITS)


def test_clipping_takes_the_response_away_and_is_named():
    def found(**options):
        policy = PolicyGradient(**options)
        held_out = [torch.zeros(1)]
        callback = OnlineHPOCallback(policy, optimizer=frozen, dataloader=held_out, seed=1)
        trainer = make_trainer(1, callbacks=callback, gradient_clip_val=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(Quadratic(), DataLoader(torch.zeros(1)))
        told = [w for w in caught if "learned by the direct gradient alone" in str(w.message)]
        return callback.history[0].hypergradients["choice"], len(told)

    (both, told), (direct, not_told) = found(), found(response=False)
    assert torch.allclose(both, direct, atol=1e-9)
    assert (told, not_told) == (1, 0)


def test_what_only_the_training_asks_for_needs_the_response():
    class Augmented(Quadratic):
        def validation_step(self, batch, batch_idx):
            return validation_loss(self.theta, 0)

    with pytest.warns(UserWarning, match=r"asks for none of the choices \['choice'\].*response"):
        estimates(Augmented(), PolicyGradient(response=False), 2)


def test_a_long_training_without_the_response():
    """Its network is summed up at the end as choices are, though it spans no window."""
    estimates(Decided(), PolicyGradient(response=False), 25, name="controller.weights")


def test_names_of_choices_differ():
    for values in (["entropy", "gini"], [1, "1"]):
        h = CategoricalHyperparameter(values, torch.tensor([2.0, 0.0]))
        chances = Choices(nn.Module(), {"h": h}, 0).chances()["h"]
        assert len(chances) == 3
        assert chances["hpo/h/entropy"] == pytest.approx(float(h.distribution().entropy()))


def test_logits_in_half_precision_are_kept_in_full():
    h = CategoricalHyperparameter([1, 2], torch.zeros(2, dtype=torch.bfloat16))
    assert h.raw.dtype == torch.float32


def test_choices_in_a_tensor_are_numbers():
    assert CategoricalHyperparameter(torch.tensor([1, 2])).choices == (1, 2)


def test_independent_controllers_tell_the_best():
    model = searched(logits=torch.tensor([0.0, 1.0, 0.0]))
    controller = IndependentController({"activation": model.activation})
    assert controller.best() == {"activation": "sigmoid"}
    assert "sigmoid 0.58" in repr(model.activation)
