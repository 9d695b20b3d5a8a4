"""The unrolled estimators return the total derivative of the training, optimizer included."""

import math
from functools import cache

import pytest
import torch
from cases import (
    CLIPPINGS,
    OPTIMIZERS,
    STEPS,
    VALID,
    Mlp,
    cosine,
    fit,
    flat,
    last_hypergradient,
    observe,
    train_batch,
    validation_loss,
    weights,
)
from reference import central_differences, differentiate_mlp

from lightning_hpo import ClipR, UnrollK, named_hyperparameters

EXACT = {
    "RTHO": lambda: ClipR(radius=math.inf),
    "forward": lambda: UnrollK(STEPS, "forward"),
    "reverse": lambda: UnrollK(STEPS, "reverse"),
}

BOTH_WAYS = pytest.mark.parametrize("inside_loss", [False, True], ids=["gradient", "loss"])


def reference(optimizer, clipping="unclipped", granularity="layer", schedule=True, **options):
    kind, settings = OPTIMIZERS[optimizer]
    return differentiate_mlp(
        Mlp(optimizer, granularity=granularity),
        train_batch,
        VALID,
        steps=STEPS,
        optimizer=kind,
        options=settings,
        schedule=cosine if schedule else lambda t: 1.0,
        **CLIPPINGS[clipping],
        **options,
    )


@cache
def differences(optimizer, clipping, inside_loss):
    """Central differences of the whole of ``trainer.fit``, callback-free."""

    def trained(raw):
        model = Mlp(optimizer, inside_loss=inside_loss, raw=raw)
        fit(model, **CLIPPINGS[clipping])
        return validation_loss(model)

    start = [h.raw.item() for h in named_hyperparameters(Mlp(optimizer)).values()]
    return central_differences(trained, start)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@BOTH_WAYS
def test_the_total_derivative_of_the_training(optimizer, clipping, inside_loss):
    truth = flat(reference(optimizer, clipping).hypergradients.values())
    numerical = differences(optimizer, clipping, inside_loss)
    for make in EXACT.values():
        callback = observe(make(), Mlp(optimizer, inside_loss=inside_loss), **CLIPPINGS[clipping])
        assert callback.history[-1].step == STEPS
        result = last_hypergradient(callback)
        torch.testing.assert_close(result, truth, rtol=1e-8, atol=0)
        torch.testing.assert_close(result, numerical, rtol=1e-5, atol=0)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_reference_follows_the_training(optimizer, clipping):
    """Without this, the reference could agree with the package about some other training."""
    model = Mlp(optimizer)
    fit(model, **CLIPPINGS[clipping])
    truth = reference(optimizer, clipping)
    torch.testing.assert_close(weights(model), flat(truth.theta.values()), rtol=1e-10, atol=1e-12)


def test_clipping_is_active_in_these_trainings():
    """By norm in some steps but not in all; by value on some elements but not on all."""
    for optimizer in OPTIMIZERS:
        by_norm = reference(optimizer, "norm").clipped
        by_value = reference(optimizer, "value").clipped
        assert any(share > 0 for share in by_norm)
        assert any(0 < share < 1 for share in by_value)
        plain = flat(reference(optimizer).hypergradients.values())
        for clipping in ("norm", "value"):
            clipped = flat(reference(optimizer, clipping).hypergradients.values())
            assert not torch.allclose(clipped, plain, rtol=1e-3)


@pytest.mark.parametrize("schedule", [False, True])
def test_the_learning_rate_is_the_one_in_force(schedule):
    truth = flat(reference("adam", schedule=schedule).hypergradients.values())
    other = flat(reference("adam", schedule=not schedule).hypergradients.values())
    assert not torch.allclose(truth, other, rtol=1e-2)
    for make in EXACT.values():
        result = last_hypergradient(observe(make(), Mlp("adam", schedule=schedule)))
        torch.testing.assert_close(result, truth, rtol=1e-8, atol=0)


@pytest.mark.parametrize("granularity", ["model", "layer"])
@BOTH_WAYS
def test_every_granularity(granularity, inside_loss):
    truth = reference("momentum", granularity=granularity).hypergradients
    assert len(truth) == {"model": 1, "layer": 2}[granularity]
    for make in EXACT.values():
        model = Mlp("momentum", granularity=granularity, inside_loss=inside_loss)
        result = observe(make(), model).history[-1].hypergradients
        torch.testing.assert_close(result, truth, rtol=1e-8, atol=0)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_every_update_of_rtho_is_exact(optimizer):
    """Tangents are kept between updates: each record is the derivative from the very start."""
    history = observe(ClipR(radius=math.inf), Mlp(optimizer)).history
    assert [record.step for record in history] == list(range(1, STEPS + 1))
    kind, settings = OPTIMIZERS[optimizer]
    for record in history:
        truth = differentiate_mlp(
            Mlp(optimizer),
            train_batch,
            VALID,
            steps=record.step,
            optimizer=kind,
            options=settings,
            schedule=cosine,
        )
        torch.testing.assert_close(
            record.hypergradients, truth.hypergradients, rtol=1e-8, atol=1e-14
        )
