"""Registrations, losses and batches that the mixins refuse."""

import pytest
import torch
from cases import Mlp

from lightning_hpo import ExampleWeightMixin, GaussianNoiseMixin, LossWeightMixin


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
    with pytest.raises(ValueError, match=r"'aux' is missing; .*weighted_loss\(main, aux=…\)"):
        model.weighted_loss(losses.sum())
    with pytest.raises(ValueError, match=r"'auxx' is not registered.*\['aux'\]"):
        model.weighted_loss(losses.sum(), auxx=losses.sum())
    with pytest.raises(ValueError, match="call register_loss_weights"):
        Bare().weighted_loss(losses.sum())
