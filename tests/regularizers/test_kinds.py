"""Every differentiable kind of hyperparameter, held to central differences of whole trainings."""

import math

import pytest
import torch
from cases import BATCH, STEPS, TRAIN, VALID, Mlp, fit, frozen, observe
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from lightning_hpo import (
    T1T2,
    Box,
    ClipR,
    ExampleWeightMixin,
    GaussianNoiseMixin,
    Hyperparameter,
    L1Ball,
    L1Mixin,
    LabelSmoothing,
    LossWeightMixin,
    OnlineHPOCallback,
    Simplex,
    UnrollK,
    named_hyperparameters,
)
from lightning_hpo.regularizers import IndexedDataset

ESTIMATORS = {
    "RTHO": lambda: ClipR(math.inf),
    "reverse": lambda: UnrollK(STEPS, "reverse"),
}


class Noise(GaussianNoiseMixin, Mlp):
    name = "noise"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_noise(0.3)


class HiddenNoise(GaussianNoiseMixin, Mlp):
    name = "noise.net.2"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_noise(0.3, at=["net.0", "net.2"], tied=False)


class L1(L1Mixin, Mlp):
    name = "l1"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_l1(0.01)


class L1InLoss(L1Mixin, Mlp):
    name = "l1"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_l1(0.01, inside_loss=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.penalty()


class Smoothing(Mlp):
    name = "criterion.epsilon"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.criterion = LabelSmoothing(0.1)

    def loss(self, batch):
        return self.criterion(self.net(batch[0]), batch[1])


class LossWeight(LossWeightMixin, Mlp):
    name = "loss_weights.size"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_loss_weights({"size": 0.5})

    def training_step(self, batch, batch_idx):
        size = self.net(batch[0]).square().mean()
        return self.weighted_loss(super().training_step(batch, batch_idx), size=size)


class ExampleWeights(ExampleWeightMixin, Mlp):
    name = "example_weights"

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_example_weights(40, 0.5)

    def training_step(self, batch, batch_idx):
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return self.weighted_mean(losses, torch.arange(8) + 8 * batch_idx)


KINDS = (Noise, HiddenNoise, L1, L1InLoss, Smoothing, LossWeight, ExampleWeights)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("kind", KINDS)
def test_hypergradients_equal_central_differences_of_the_training(kind, optimizer):
    def trained(element, distance):
        model = kind(optimizer)
        named_hyperparameters(model)[kind.name].raw.view(-1)[element] += distance
        torch.manual_seed(7)
        fit(model)
        with torch.no_grad():
            return F.cross_entropy(model.net.eval()(VALID[0]), VALID[1]).item()

    size = named_hyperparameters(kind(optimizer))[kind.name].raw.numel()
    elements = range(min(size, 3))
    h = 1e-4
    truth = torch.tensor([(trained(i, h) - trained(i, -h)) / (2 * h) for i in elements])
    assert truth.norm() > 1e-5
    for make in ESTIMATORS.values():
        model = kind(optimizer)
        torch.manual_seed(7)
        callback = observe(make(), model)
        found = callback.history[-1].hypergradients[kind.name].flatten()[: len(truth)]
        assert (found - truth).norm() < 1e-5 * truth.norm()


class Tuned(Mlp):
    """Its optimizer can be made with other options, as central differences need."""

    def __init__(self, optimizer, schedule, option=None, element=0, distance=0.0):
        super().__init__(optimizer, schedule=schedule)
        self.change = (option, element, distance)

    def configure_optimizers(self):
        result = super().configure_optimizers()
        optimizer = result["optimizer"] if self.schedule else result
        (group,) = optimizer.param_groups
        option, element, distance = self.change
        if option == "lr":
            group["lr"] *= math.exp(distance)
            if self.schedule:
                result["lr_scheduler"]["scheduler"].base_lrs = [
                    group["initial_lr"] * math.exp(distance)
                ]
        elif option == "betas":
            betas = list(group["betas"])
            logit = math.log(betas[element] / (1 - betas[element])) + distance
            betas[element] = 1 / (1 + math.exp(-logit))
            group["betas"] = tuple(betas)
        elif option is not None:
            group[option] += distance
        return result


@pytest.mark.parametrize("schedule", [True, False], ids=["schedule", "constant"])
@pytest.mark.parametrize(
    ("optimizer", "option"),
    [
        ("momentum", "lr"),
        ("momentum", "momentum"),
        ("momentum", "weight_decay"),
        ("nesterov", "momentum"),
        ("adam", "lr"),
        ("adam", "betas"),
        ("adam", "weight_decay"),
        ("rmsprop", "alpha"),
    ],
)
def test_optimizer_options_equal_central_differences_of_the_training(optimizer, option, schedule):
    def trained(element, distance):
        model = Tuned(optimizer, schedule, option, element, distance)
        fit(model)
        with torch.no_grad():
            return model.loss(VALID).item()

    h = 1e-5
    truth = torch.tensor(
        [(trained(i, h) - trained(i, -h)) / (2 * h) for i in range(2 if option == "betas" else 1)]
    )
    for make in ESTIMATORS.values():
        callback = OnlineHPOCallback(make(), optimizer=frozen, optimizer_hyperparameters=[option])
        fit(Tuned(optimizer, schedule), callback)
        raw_scale = 0.99 if option == "alpha" else 1.0  # α is tuned on a log scale
        found = callback.history[-1].hypergradients[f"optimizer.{option}"].flatten() / raw_scale
        assert (found - truth).norm() < 1e-5 * truth.norm()


def test_a_schedule_is_scaled_and_goes_on_as_it_was():
    """The scheduler finds the learning rate that it set; the step sees λ times it."""
    seen = []

    class Watching(Mlp):
        def on_train_batch_end(self, *args):
            seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    plain = Watching("sgd")
    fit(plain)
    rates = list(seen)
    seen.clear()
    callback = OnlineHPOCallback(
        T1T2(),
        optimizer=lambda raw: torch.optim.SGD(raw, lr=1.0),
        optimizer_hyperparameters=["lr"],
    )
    fit(Watching("sgd"), callback)
    assert seen == rates
    scales = [record.values["optimizer.lr"] for record in callback.history]
    assert scales[-1] != pytest.approx(1.0, rel=1e-3)


def test_tuned_options_survive_a_checkpoint(tmp_path):
    def train(epochs, path=None):
        callback = OnlineHPOCallback(ClipR(), optimizer_hyperparameters=["lr", "momentum"])
        model = Mlp("momentum")
        trainer = fit(model, callback, steps=-1, max_epochs=epochs, ckpt_path=path)
        return model, callback, trainer

    whole = train(4)
    *_, trainer = train(2)
    path = str(tmp_path / "half.ckpt")
    trainer.save_checkpoint(path)
    resumed = train(4, path)
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(resumed[0].state_dict()[name], tensor), name
    assert resumed[1].history == whole[1].history


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dampning"], r"'dampning' .* but SGD has no such number; it has \['lr', 'momentum'"),
        (["nesterov"], r"'nesterov' .* but SGD has no such number"),
        (["betas"], r"'betas' .* but SGD has no such number"),
    ],
)
def test_an_option_that_the_optimizer_does_not_have_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(Mlp("momentum"), OnlineHPOCallback(T1T2(), optimizer_hyperparameters=options))


# ------------------------------------------------------------------------------------ constraints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("lr", r"optimizer_hyperparameters='lr', expected a list of names: \['lr'\]"),
        ({"lr": 0.1}, r"\['lr'\] is a float, expected a Hyperparameter"),
    ],
)
def test_options_that_are_no_names_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        OnlineHPOCallback(optimizer_hyperparameters=options)


def test_an_option_of_two_numbers_takes_no_single_one():
    options = {"betas": Hyperparameter(0.9)}
    with pytest.raises(ValueError, match=r"'betas' of Adam has 2 number\(s\), .* has 1"):
        fit(Mlp("adam"), OnlineHPOCallback(T1T2(), optimizer_hyperparameters=options))


def test_projections_are_the_nearest_points():
    torch.manual_seed(0)
    for _ in range(20):
        x = torch.randn(6) * 2
        simplex = Simplex(2.0).project(x)
        assert simplex.sum().item() == pytest.approx(2.0)
        assert bool((simplex >= 0).all())
        ball = L1Ball(1.5).project(x)
        assert ball.abs().sum() <= 1.5 + 1e-9
        for project, feasible in ((simplex, Simplex(2.0)), (ball, L1Ball(1.5))):
            for _ in range(20):
                other = feasible.project(torch.randn(6))
                # The variational inequality of a projection onto a convex set.
                assert torch.dot(x - project, other - project) <= 1e-9
    assert torch.equal(
        Box(0.0, 1.0).project(torch.tensor([-1.0, 0.5, 2.0])), torch.tensor([0.0, 0.5, 1.0])
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1Ball(0.0), r"positive, finite radius"),
        (lambda: L1Ball(-1.0), r"positive, finite radius"),
        (lambda: Simplex(0.0), r"positive, finite total"),
        (lambda: L1Ball(1.0).inverse(torch.full((4,), 0.5)), r"L1 norm 2.*radius.*start at 0\.25"),
        (lambda: Simplex().inverse(torch.full((4,), 0.5)), r"sum to 2, expected 1"),
    ],
)
def test_infeasible_constraints_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -------------------------------------------------------------------------------------- bad input


class Bare(GaussianNoiseMixin, ExampleWeightMixin, LossWeightMixin, Mlp):
    pass


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.register_noise(0.1, at=["net.7"]), r"no module 'net\.7'; the closest names"),
        (lambda m: m.register_noise(0.1, at=["net.0", "net.0"]), r"expected different modules"),
        (lambda m: m.register_noise(0.1, at=[]), r"expected different modules, at least one"),
        (lambda m: m.weighted_mean(torch.ones(2), torch.tensor([0, 1])), r"register_example_we"),
        (lambda m: m.register_noise(-0.1), r"-0\.1.*lies outside"),
        (lambda m: m.register_noise(0.1, name="net"), r"name='net' is taken"),
        (lambda m: m.register_loss_weights({}), r"expected a weight for each name"),
        (lambda m: m.register_example_weights(0), r"count=0"),
        (lambda m: m.register_loss_weights({"training": 1.0}), r"free attribute name"),
        (
            lambda m: [m.register_example_weights(3, name=n) for n in ("a", "b")],
            r"has example weights already, self\.a",
        ),
        (lambda m: m.register_example_weights(3, torch.ones(4)), r"shape \(4,\), expected \(3,\)"),
    ],
)
def test_bad_registrations_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(Bare())


def test_bad_batches_are_refused():
    model = Bare()
    model.register_example_weights(10)
    model.register_loss_weights({"aux": 1.0})
    losses = torch.ones(3)
    for index, message in (
        (None, "index is NoneType"),
        (torch.ones(3), "index is Tensor"),
        (torch.ones(3, dtype=torch.bool), "index is Tensor"),
        (torch.tensor([0, 1]), "one loss per example"),
        (torch.tensor([0, 1, 10]), r"reaches from 0 to 10, but there are 10"),
        (torch.tensor([-1, 1, 2]), r"reaches from -1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.weighted_mean(losses, index)
    with pytest.raises(ValueError, match="'aux' is missing"):
        model.weighted_loss(losses.sum())
    with pytest.raises(ValueError, match=r"'auxx' is not registered|'aux' is missing"):
        model.weighted_loss(losses.sum(), auxx=losses.sum())
    with pytest.raises(ValueError, match="call register_loss_weights"):
        Bare().weighted_loss(losses.sum())


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(30))], ids=["all", "part"])
def test_too_few_example_weights_are_refused_before_the_first_step(wrap):
    class Weighed(ExampleWeightMixin, Mlp):
        def __init__(self, count):
            super().__init__()
            self.register_example_weights(count, 0.5)

        def training_step(self, batch, batch_idx):
            x, y, index = batch
            return self.weighted_mean(F.cross_entropy(self.net(x), y, reduction="none"), index)

    def train(count):
        loader = DataLoader(wrap(IndexedDataset(TensorDataset(*TRAIN))), batch_size=BATCH)
        model = Weighed(count)
        fit(model, OnlineHPOCallback(T1T2()), train=loader)
        return model

    needed = 40 if len(wrap(TensorDataset(*TRAIN))) == 40 else 30
    train(needed)
    with pytest.raises(
        MisconfigurationException, match=rf"{needed - 1} example weights.*register.*\({needed}\)"
    ):
        train(needed - 1)


def test_indexed_datasets_that_would_share_weights_are_refused():
    class Weighed(ExampleWeightMixin, Mlp):
        def __init__(self):
            super().__init__()
            self.register_example_weights(80, 0.5)

        def training_step(self, batch, batch_idx):
            x, y, index = batch
            return self.weighted_mean(F.cross_entropy(self.net(x), y, reduction="none"), index)

    part = TensorDataset(*TRAIN)
    wrong = ConcatDataset([IndexedDataset(part), IndexedDataset(part)])
    with pytest.raises(MisconfigurationException, match=r"IndexedDataset\(ConcatDataset"):
        fit(Weighed(), OnlineHPOCallback(T1T2()), train=DataLoader(wrong, batch_size=BATCH))
    right = IndexedDataset(ConcatDataset([part, part]))
    fit(Weighed(), OnlineHPOCallback(T1T2()), train=DataLoader(right, batch_size=BATCH))


def test_small_integers_are_positions_and_no_mask():
    model = Bare()
    model.register_example_weights(4, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    index = torch.full((4,), 3, dtype=torch.uint8)
    assert model.weighted_mean(torch.ones(4), index).item() == pytest.approx(0.4)


def test_indexed_dataset_adds_the_position():
    data = IndexedDataset(torch.utils.data.TensorDataset(torch.arange(5.0)))
    assert data[3] == (torch.tensor(3.0), 3)
    assert len(data) == 5


def test_noise_acts_in_training_only():
    model = Noise("sgd")
    x = VALID[0]
    torch.manual_seed(0)
    noisy = model.train().net(x)
    assert not torch.allclose(noisy, model.eval().net(x))
    with torch.no_grad():
        model.noise.raw.zero_()
    assert torch.equal(model.train().net(x), model.eval().net(x))


def test_several_kinds_train_together_and_log_separately():
    class Everything(GaussianNoiseMixin, Mlp):
        def __init__(self):
            super().__init__("momentum")
            self.net.append(nn.Identity())
            self.register_noise(0.1)

    callback = OnlineHPOCallback(ClipR(), optimizer_hyperparameters=["lr"])
    fit(Everything(), callback)
    first, last = callback.history[0], callback.history[-1]
    assert set(last.values) == {"l2.net.0", "l2.net.2", "noise", "optimizer.lr"}
    assert all(last.values[name] != first.values[name] for name in last.values)
