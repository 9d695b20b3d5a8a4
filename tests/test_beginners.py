"""What beginners slip on: the message says what to do, before anything has moved, or it works."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from cases import Mlp, fit, make_trainer, train_loader, valid_loader, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    Hyperparameter,
    L1Mixin,
    L2Mixin,
    LossWeightMixin,
    OnlineHPOCallback,
    Positive,
    TunableDropout,
    fixed_values,
    freeze,
    named_hyperparameters,
)


def refused(model, error=MisconfigurationException, callbacks=None):
    """Fits a module that is refused, unmoved; returns the message."""
    before = weights(model).clone()
    with pytest.raises(error) as caught:
        fit(model, callbacks or OnlineHPOCallback(T1T2()))
    assert torch.equal(weights(model), before)
    return str(caught.value)


# ------------------------------------------------------------------------------- several optimizers


class TwoOptimizers(Mlp):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


class TwoGroups(Mlp):
    def configure_optimizers(self):
        groups = [
            {"params": self.net[0].parameters(), "lr": 0.1},
            {"params": self.net[2].parameters(), "lr": 0.2},
        ]
        return torch.optim.SGD(groups)


def test_advice_on_several_optimizers_is_not_circular():
    message = refused(TwoOptimizers(), RuntimeError)  # Lightning's own, which asks for manual ones
    assert "do not set automatic_optimization = False" in message
    assert "Adam([{'params': self.encoder.parameters(), 'lr': 1e-4}" in message

    manual = TwoOptimizers()
    manual.automatic_optimization = False
    assert "several parameter groups" in refused(manual)

    callback = OnlineHPOCallback(T1T2())
    fit(TwoGroups(), callback)  # what is advised works
    assert len(callback.history)


def test_other_errors_are_left_as_they_are():
    class Fails(Mlp):
        def configure_optimizers(self):
            raise RuntimeError("out of luck")

    assert refused(Fails(), RuntimeError) == "out of luck"


# ------------------------------------------------------------------------------------------- frozen


def test_frozen_hyperparameters_are_not_said_to_be_missing():
    message = refused(freeze(Mlp(), fixed_values(Mlp())))
    assert "All hyperparameters of Mlp are frozen" in message
    assert "Leave OnlineHPOCallback out" in message
    assert "no Hyperparameter" not in message


def test_frozen_weights_are_named_as_the_reason():
    model = Mlp()
    for p in model.parameters():
        p.requires_grad_(False)
    message = refused(model)
    assert "All 4 parameters that the optimizer moves are frozen" in message


# ------------------------------------------------------------------------------------------ dropout


class Droppy(DropoutMixin, Mlp):
    def __init__(self, **options):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.register_dropout(**options)


@pytest.mark.parametrize("init", [1, 1.0, 0, 0.0, 1.5])
def test_keep_probabilities_that_drop_nothing_or_all(init):
    with pytest.raises(ValueError, match=r"It is 1 − p: for a drop rate of p = 0\.2 pass 0\.8"):
        Droppy(init=init)
    with pytest.raises(ValueError, match=r"It is 1 − p"):
        TunableDropout(init)


@pytest.mark.parametrize("name", ["p", "drop_prob", "rate"])
def test_a_drop_rate_is_asked_for_as_a_keep_probability(name):
    with pytest.raises(
        TypeError, match=rf"no argument '{name}': init= is the keep.*pass init=0\.8"
    ):
        Droppy(**{name: 0.2})
    assert Droppy(init=0.8).keep().item() == pytest.approx(0.8)


def test_a_layer_that_drops_everything():
    class All(DropoutMixin, Mlp):
        def __init__(self, **options):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(1.0), nn.Linear(8, 3))
            self.register_dropout(**options)

    with pytest.raises(
        ValueError, match=r"net\.1 .*p=1, which drops everything.*nn\.Dropout\(0\.2\).*such as 0\.8"
    ):
        All()
    assert All(init=0.8).keep().item() == pytest.approx(0.8)


# ------------------------------------------------------------------ a hyperparameter, not its value


class Asked:
    """Finds out whether torch asks arguments that are to be numbers."""

    @classmethod
    def __torch_function__(cls, *args):
        return True


def asks_numbers():
    try:
        return torch.nn.functional.huber_loss(torch.ones(1), torch.ones(1), delta=Asked()) is True
    except TypeError:
        return False


older_torch = pytest.mark.skipif(
    not asks_numbers(), reason="this torch refuses by itself what is to be a number and is none"
)


@pytest.mark.parametrize(
    "use",
    [
        lambda h, x: h * x,
        lambda h, x: x * h,
        lambda h, x: 1 - h,
        lambda h, x: h + 1,
        lambda h, x: x / h,
        lambda h, x: x**h,
        lambda h, x: -h,
        lambda h, x: float(h),
        lambda h, x: round(h, 2),
        lambda h, x: h if h > 0 else x,
        lambda h, x: max(h, 0.1),
        lambda h, x: h[0],
        lambda h, x: math.exp(h),
        lambda h, x: np.exp(h),
        lambda h, x: torch.optim.SGD([x], lr=h),
        lambda h, x: torch.exp(h),
        lambda h, x: torch.sigmoid(h),
        lambda h, x: torch.stack([h, h]),
        lambda h, x: torch.where(x > 0, h, x),
        lambda h, x: torch.lerp(x, x, h),
        lambda h, x: x.clamp(max=h),
        lambda h, x: torch.mul(x, h),
        lambda h, x: nn.functional.linear(x, h),
        lambda h, x: nn.functional.dropout(x, h),
        lambda h, x: torch.distributions.Beta(h, h),
        pytest.param(
            lambda h, x: nn.functional.cross_entropy(x, torch.tensor(0), label_smoothing=h),
            marks=older_torch,
        ),
        pytest.param(lambda h, x: nn.functional.huber_loss(x, x, delta=h), marks=older_torch),
    ],
)
def test_arithmetic_with_a_hyperparameter_says_to_call_it(use):
    h = Hyperparameter(0.5)
    with pytest.raises(TypeError, match=r"call it, as in self\.alpha\(\) \* x instead of"):
        use(h, nn.Parameter(torch.ones(3)))
    assert torch.equal(h() * torch.ones(3), torch.full((3,), 0.5))


@older_torch
def test_label_smoothing_has_a_module_of_its_own():
    with pytest.raises(TypeError, match=r"with a derivative is lightning_hpo\.LabelSmoothing$"):
        nn.functional.cross_entropy(
            torch.ones(1, 3), torch.tensor([0]), label_smoothing=Hyperparameter(0.1)
        )


def test_a_hyperparameter_is_written_as_its_value():
    h = Hyperparameter(0.123, Positive())
    assert f"{h:.2f} {h:>6.1e}" == "0.12 1.2e-01"
    assert f"{h}" == str(h) == repr(h)


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = Hyperparameter(0.5, Positive())
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.alpha() * self.linear(x) + self.alpha.value


@pytest.mark.parametrize(
    "made",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.compile(m, backend="eager", fullgraph=True),
        lambda m: torch.export.export(m, (torch.ones(3),)).module(),
        lambda m: partial(torch.func.functional_call, m, dict(m.named_parameters())),
        lambda m: partial(torch.utils.checkpoint.checkpoint, m, use_reentrant=False),
    ],
    ids=["deepcopy", "pickle", "compile", "export", "functional", "checkpoint"],
)
def test_to_refuse_it_in_functions_is_in_nobodys_way(made):
    module, x = Halved(), torch.ones(3)
    torch.testing.assert_close(made(module)(x), module(x))


def test_in_a_training_step_too():
    class Weighted(Mlp):
        def __init__(self):
            super().__init__()
            self.alpha = Hyperparameter(0.5)

        def training_step(self, batch, batch_idx):
            return self.alpha * self.loss(batch)

    assert "call it" in refused(Weighted(), TypeError)


# ----------------------------------------------------------------------------------- misspelt names


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: OnlineHPOCallback(every_n_step=3), r"did you mean 'every_n_steps'\?"),
        (lambda m: OnlineHPOCallback(metric="val_loss"), "is given as monitor="),
        (lambda m: ClipR(raduis=1.0), r"ClipR has no argument 'raduis': did you mean 'radius'\?"),
        (lambda m: T1T2(lr=0.1), "T1T2 has no argument 'lr': it takes scale_by_lr"),
        (lambda m: Hyperparameter(1.0, constrain=None), r"did you mean 'constraint'\?"),
        (lambda m: OnlineHPOCallback(learning_rate=0.1), r"lr=2\.0 doubles it"),
        (lambda m: OnlineHPOCallback(colour="red"), r"no argument 'colour': it takes estimator, "),
        (lambda m: m.register_l2(granularty="layer"), r"register_l2 .* mean 'granularity'\?"),
        (lambda m: m.register_l2(strength=0.1), r"given as init="),
        (lambda m: m.register_l2(lr=0.1), r"OnlineHPOCallback\(lr=2\.0\)"),
        (lambda m: m.register_l1(paramters=[]), r"register_l1 .* mean 'parameters'\?"),
        (
            lambda m: OnlineHPOCallback(T1T2),
            r"T1T2 is a class, expected an instance of an Estimator: T1T2\(\)",
        ),
        (lambda m: OnlineHPOCallback({"*": ClipR}), r"ClipR is a class.*: ClipR\(\)"),
        (lambda m: OnlineHPOCallback(monitor=3), r"monitor=3 is a int, expected the name"),
        (
            lambda m: OnlineHPOCallback(optimizer_hyperparameters={"weight_decay": 1e-3}),
            r"is a float.*\{'weight_decay': Hyperparameter\(1e-3, Positive\(\)\)\}",
        ),
        (
            lambda m: OnlineHPOCallback(dataloader=[valid_loader().dataset]),
            r"holds a Dataset, expected DataLoaders",
        ),
    ],
)
def test_unknown_keywords_get_the_closest_one(call, message):
    class Model(L1Mixin, L2Mixin, pl.LightningModule):
        pass

    with pytest.raises(TypeError, match=message):
        call(Model())


def test_signatures_stay_visible():
    names = [*inspect.signature(OnlineHPOCallback).parameters]
    assert names[:2] == ["estimator", "optimizer"]
    assert "granularity" in inspect.signature(L2Mixin.register_l2).parameters


def test_a_factor_that_looks_like_a_learning_rate_is_warned_about():
    with pytest.warns(UserWarning, match=r"lr=0\.001 is a factor.*1000 times as slowly"):
        OnlineHPOCallback(lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OnlineHPOCallback(lr=2.0)
        OnlineHPOCallback(lr=0.0)


# ------------------------------------------------------------------------ where hyperparameters are


class TwoLosses(LossWeightMixin, Mlp):
    pass


@pytest.mark.parametrize(
    ("inits", "message"),
    [
        (["size"], r"inits=\['size'\], expected a weight .* for example \{'size': 1\.0\}"),
        (("size", "tilt"), r"for example \{'size': 1\.0, 'tilt': 1\.0\}"),
        ("size", r"inits='size', expected .* for example \{'size': 1\.0\}"),
        (0.1, r"inits=0\.1, expected .* for example \{'context': 1\.0\}"),
        ({0: 0.1}, r"by its name, for example \{'context': 1\.0\}"),
        ({"size": "0.1"}, r"the weight of 'size' is '0\.1', expected a number"),
        ({"size": None}, r"the weight of 'size' is None, expected a number"),
    ],
)
def test_loss_weights_of_another_kind(inits, message):
    with pytest.raises(TypeError, match=f"register_loss_weights: .*{message}"):
        TwoLosses().register_loss_weights(inits)


@pytest.mark.parametrize("value", [1e-3, 1, torch.tensor(1e-3), nn.Parameter(torch.tensor(1e-3))])
def test_a_number_in_the_place_of_a_hyperparameter(value):
    shared, each = Mlp(granularity="model"), Mlp(granularity="layer")
    with pytest.raises(TypeError, match=r"Mlp\.l2 is a hyper.*: module\.l2\.value = (0\.001|1)$"):
        shared.l2 = value
    with pytest.raises(TypeError, match=r"l2 holds a hyper.*: module\.l2\.net\.0\.value = "):
        each.l2 = value
    shared.l2.value = torch.as_tensor(value).item()  # what is advised works
    assert shared.l2().item() == pytest.approx(torch.as_tensor(value).item())
    shared.other = value  # so does all else
    shared.l2 = Hyperparameter(0.5)
    assert shared.l2().item() == 0.5


def test_a_penalty_before_the_module_has_been_begun():
    class Early(L2Mixin, pl.LightningModule):
        def __init__(self):
            self.register_l2()
            super().__init__()

    with pytest.raises(ValueError, match=r"call super\(\).__init__\(\) first.*call register_l2"):
        Early()


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_hyperparameters_in_a_list(kind):
    class Listed(Mlp):
        def __init__(self):
            super().__init__()
            self.alphas = kind({"a": Hyperparameter(0.5)}.items())
            if kind is not dict:
                self.alphas = kind(value for _, value in self.alphas)

        def training_step(self, batch, batch_idx):
            (alpha,) = self.alphas.values() if kind is dict else self.alphas
            return alpha() * self.loss(batch)

    message = refused(Listed())
    assert f"'alphas' is a {kind.__name__} with a Hyperparameter, in which it is not" in message
    assert ("ModuleDict" if kind is dict else "ModuleList") in message


def test_lists_of_hyperparameters_that_are_found_anyway():
    callback = OnlineHPOCallback(T1T2(), optimizer_hyperparameters={"lr": Hyperparameter(0.1)})
    model = Mlp()
    model.all = [*named_hyperparameters(model).values(), *callback._option_names.values()]
    fixed = Hyperparameter(0.5)
    fixed.frozen = True
    model.others = {"fixed": fixed}
    fit(model, callback)
    assert len(callback.history)


# ------------------------------------------------------------------------------- layers that follow


class LaterHead(Mlp):
    """Registers its penalty before it is complete."""

    def __init__(self, **options):
        super().__init__()
        self.register_l2(1e-3, "more", **options)
        self.head = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.net(x)), y)


def warned(model, callback=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=callback).fit(model, train_loader(), valid_loader())
    return [str(w.message) for w in caught if "no penalty acts on" in str(w.message)]


@pytest.mark.parametrize("callback", [None, OnlineHPOCallback(T1T2())], ids=["alone", "callback"])
def test_weights_that_came_after_the_penalty_are_named_once(callback):
    model = LaterHead()
    (message,) = warned(model, callback)
    assert "no penalty acts on 'head.0.weight', added after" in message  # no bias, no norm
    assert warned(model) == []


def test_what_is_left_out_by_design_is_not_named():
    class Norms(Mlp):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(3)

        def loss(self, batch):
            return nn.functional.cross_entropy(self.norm(self.net(batch[0])), batch[1])

    frozen = LaterHead()
    frozen.head[0].weight.requires_grad_(False)
    covered = LaterHead()
    covered.register_l2(1e-3, "rest", parameters=["head.0.weight"])
    pruned = Mlp()
    nn.utils.prune.l1_unstructured(pruned.net[0], "weight", amount=1)
    for model in (Mlp(), Norms(), frozen, covered, pruned):
        assert warned(model) == []


def test_chosen_weights_are_meant_to_be_these_alone():
    class Chosen(L2Mixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3).double()
            self.register_l2(1e-3, parameters=["net.weight"])
            self.head = nn.Linear(3, 3).double()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    assert warned(Chosen()) == []


# ---------------------------------------------------------------------------------- penalty() twice


class InLoss(Mlp):
    def __init__(self, times, granularity="model"):
        super().__init__(inside_loss=True)
        self.register_l2(1e-2, "more", granularity, inside_loss=True)
        self.times = times

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + sum(self.penalty() for _ in range(self.times))


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_penalty_that_counts_twice(granularity, accumulated):
    model = InLoss(2, granularity)
    before = weights(model).clone()
    with pytest.raises(
        MisconfigurationException, match=r"2 times, expected once.*Add self\.penalty"
    ):
        fit(model, OnlineHPOCallback(T1T2()), accumulate_grad_batches=accumulated)
    assert torch.equal(weights(model), before)
    fit(InLoss(1, granularity), OnlineHPOCallback(T1T2()), accumulate_grad_batches=accumulated)


# ------------------------------------------------------------------------------ the validation loss


class Validating(Mlp):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def validation_step(self, batch, batch_idx):
        return self.step(self, batch)


def accuracy(model, batch):
    return (model.net(batch[0]).argmax(1) == batch[1]).double().mean()


def test_an_accuracy_is_no_validation_loss():
    message = refused(Validating(accuracy))
    assert "An accuracy" in message
    assert "return the loss, and log the accuracy" in message


def test_a_dict_without_a_loss_is_shown():
    message = refused(Validating(lambda m, batch: {"accuracy": accuracy(m, batch)}))
    assert "returned no loss (a dict with ['accuracy'])" in message


@pytest.mark.parametrize(
    ("step", "question"),
    [
        (lambda m, batch: m.log("val_loss", m.loss(batch)), ": did you mean 'val_loss'?"),
        (lambda m, batch: {"val_loss": m.loss(batch)}, ": did you mean 'val_loss'?"),
        (lambda m, batch: m.log("other", m.loss(batch)), "."),
    ],
)
def test_the_closest_of_what_was_logged(step, question):
    message = refused(Validating(step), callbacks=OnlineHPOCallback(T1T2(), monitor="val_los"))
    assert "does not log monitor='val_los'; it logged " in message
    assert f"]{question} Return the loss" in message


@pytest.mark.parametrize(
    ("output", "options"),
    [
        (lambda loss: {"val_loss": loss}, {}),
        (lambda loss: {"loss": loss, "val_loss": loss * 2}, {}),
        (lambda loss: {"mine": loss, "val_loss": loss * 2}, {"monitor": "mine"}),
    ],
)
def test_a_returned_dict_serves(output, options):
    losses = []
    for step in (Mlp.loss, lambda m, batch: output(m.loss(batch))):
        callback = OnlineHPOCallback(T1T2(), **options if step is not Mlp.loss else {})
        fit(Validating(step), callback)
        losses.append([record.loss for record in callback.history])
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------ after the run


def test_values_of_a_checkpoint(tmp_path):
    model = Mlp()
    trainer = fit(model, OnlineHPOCallback(T1T2()))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(
        TypeError, match=r"got a PosixPath.*fixed_values\(freeze\(LitClassifier\(\)"
    ):
        fixed_values(path)
    assert fixed_values(freeze(Mlp(), path)) == fixed_values(model)  # what is advised works
    with pytest.raises(TypeError, match=r"got a Trainer.*pass that module"):
        fixed_values(trainer)
    with pytest.raises(TypeError, match=r"freeze\(LitClassifier\(\), values\)"):
        freeze(fixed_values(model), Mlp())
    with pytest.raises(TypeError, match=r"values is a Mlp.*expected what fixed_values"):
        freeze(Mlp(), model)


def test_an_option_of_the_optimizer_has_its_prefix():
    with pytest.raises(
        ValueError,
        match=r"no hyperparameter 'weight_decay'.*\{'optimizer\.weight_decay': 0\.01\}\.",
    ) as caught:
        freeze(Mlp(), {"weight_decay": 0.01})
    assert "configure_optimizers" in str(caught.value)
    model = freeze(Mlp(), {"optimizer.weight_decay": 0.01})  # what is advised works
    assert fixed_values(model)["optimizer.weight_decay"] == 0.01
    with pytest.raises(ValueError, match=r"'l2\.net\.1'; there are .*did you mean 'l2\.net\.\d'"):
        freeze(Mlp(), {"l2.net.1": 0.01})
    with pytest.raises(ValueError, match=r"there are none$"):
        freeze(nn.Linear(2, 2), {"colour": 0.01})


# -------------------------------------------------------------------------------------- two of them


def test_a_strength_of_zero_is_to_be_left_out():
    with pytest.raises(
        ValueError, match=r"init=0\.0 is refused.* A strength of 0 is to leave it out"
    ):
        Hyperparameter(0.0, Positive())
    with pytest.raises(ValueError, match=r"init=1e-20 is refused") as error:
        Hyperparameter(1e-20, Positive())
    assert "leave it out" not in str(error.value)


def test_the_name_of_an_optimizer_is_no_optimizer():
    with pytest.raises(
        TypeError, match=r"optimizer='adam'.*for example optimizer=lambda raw: torch"
    ):
        OnlineHPOCallback(optimizer="adam")


def test_a_misspelt_option_of_the_optimizer():
    callback = OnlineHPOCallback(optimizer_hyperparameters=["weight_deacy"])
    assert ": did you mean 'weight_decay'?" in refused(Mlp(), ValueError, callback)


def test_two_callbacks():
    class Other(OnlineHPOCallback):
        pass

    message = refused(Mlp(), callbacks=[OnlineHPOCallback(T1T2()), Other(T1T2())])
    assert "has 2 OnlineHPOCallbacks, expected one" in message
    assert "OnlineHPOCallback({'l2*': T1T2()" in message
    # Of the very same class, Lightning refuses two by itself, and points to its documentation.
    with pytest.raises(RuntimeError, match=r"consult the documentation of `OnlineHPOCallback`"):
        make_trainer(callbacks=[OnlineHPOCallback(), OnlineHPOCallback()])
    assert "A Trainer takes one such callback" in OnlineHPOCallback.__doc__
