"""Tuned options of the optimizer, held to central differences of whole trainings."""

import math

import pytest
import torch
from cases import STEPS, VALID, Mlp, fit, frozen

from lightning_hpo import T1T2, ClipR, Hyperparameter, OnlineHPOCallback, UnrollK

ESTIMATORS = {
    "RTHO": lambda: ClipR(math.inf),
    "reverse": lambda: UnrollK(STEPS, "reverse"),
}


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
