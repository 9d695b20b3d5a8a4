"""sync_tangents=False: each rank follows its own tangents, and λ stay equal on all ranks."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from cases import BATCH, TRAIN, VALID, Mlp, make_trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_hpo import ClipR, OnlineHPOCallback, UnrollK, named_hyperparameters

ESTIMATORS = {
    "ClipR": lambda **options: ClipR(2.0, decay=0.9, **options),
    "RTHO": lambda **options: ClipR(math.inf, **options),
    "forward": lambda **options: UnrollK(3, "forward", **options),
}


pytestmark = pytest.mark.usefixtures("within_two_minutes")


class Model(Mlp):
    """Every rank trains on the same batches, or each on its part of them."""

    def __init__(self, identical, **options):
        super().__init__("momentum", **options)
        self.identical = identical
        # Buffers come back from the process of rank 0.
        self.register_buffer("compared", torch.zeros(1))
        self.register_buffer("largest_norm_gap", torch.zeros(1))

    def train_dataloader(self):
        world = 1 if self.identical else self.trainer.world_size
        data = TensorDataset(*TRAIN)
        rank = 0 if self.identical else self.global_rank
        sampler = DistributedSampler(data, world, rank, shuffle=False)
        return DataLoader(data, batch_size=BATCH // world, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*VALID), batch_size=20 // self.trainer.world_size)


class Compare(pl.Callback):
    """Compares λ, and the norms of the tangents, on all ranks after every step."""

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.world_size == 1:
            return
        raw = torch.stack([h.raw for h in named_hyperparameters(module).values()])
        every = [torch.empty_like(raw) for _ in range(trainer.world_size)]
        dist.all_gather(every, raw)
        assert torch.equal(every[0], every[1])
        module.compared += 1
        (callback,) = (c for c in trainer.callbacks if isinstance(c, OnlineHPOCallback))
        if callback.history:
            norms = torch.tensor(list(callback.history[-1].tangent_norms.values()))
            every = [torch.empty_like(norms) for _ in range(trainer.world_size)]
            dist.all_gather(every, norms)
            gap = (every[0] - every[1]).abs().max().reshape(1)
            module.largest_norm_gap.copy_(torch.maximum(module.largest_norm_gap, gap))


def train(estimator, devices, *, identical, steps=10, **options):
    model = Model(identical, **options)
    callback = OnlineHPOCallback(estimator, optimizer=lambda raw: torch.optim.SGD(raw, lr=3.0))
    trainer = make_trainer(
        steps,
        callbacks=[callback, Compare()],
        devices=devices,
        # Broadcast buffers would hide λ that have drifted apart.
        strategy=DDPStrategy(start_method="fork", broadcast_buffers=False)
        if devices > 1
        else "auto",
        gradient_clip_val=0.3,
        use_distributed_sampler=False,
    )
    trainer.fit(model)
    raw = torch.stack([h.raw for h in named_hyperparameters(model).values()])
    assert (raw - math.log(0.05)).abs().min() > 1e-6
    assert model.compared == (steps if devices > 1 else 0)
    return model, raw, torch.cat([p.detach().flatten() for p in model.net.parameters()])


@pytest.mark.parametrize("inside_loss", [False, True])
@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_exact_where_all_ranks_see_the_same_data(make, inside_loss):
    _, raw, theta = train(make(), 1, identical=True, inside_loss=inside_loss)
    model, raw_two, theta_two = train(
        make(sync_tangents=False), 2, identical=True, inside_loss=inside_loss
    )
    torch.testing.assert_close(raw_two, raw, rtol=1e-9, atol=0)
    torch.testing.assert_close(theta_two, theta, rtol=1e-9, atol=1e-12)
    assert model.largest_norm_gap < 1e-12


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_an_approximation_where_they_do_not(make):
    """The tangents of the ranks differ, and so does λ from the exact ones, by little."""
    exact, raw, _ = train(make(), 2, identical=False)
    model, raw_local, _ = train(make(sync_tangents=False), 2, identical=False)
    assert exact.largest_norm_gap == 0
    assert model.largest_norm_gap > 1e-6
    moved = (raw - math.log(0.05)).norm()
    assert 1e-6 * moved < (raw_local - raw).norm() < 0.5 * moved


@pytest.mark.slow
def test_lambda_stay_equal_over_a_hundred_steps():
    train(ClipR(2.0, decay=0.9, sync_tangents=False), 2, identical=False, steps=100)


def test_no_collective_is_made_between_updates(monkeypatch):
    """Counts the collectives of one process that pretends to be one of several."""
    from lightning_hpo.step import backends, batches, replay_check, space, tangents, validation

    counts = {}
    places = [("gradient", m) for m in (backends, batches, replay_check, space, validation)]
    for name, module in (*places, ("hypergradient", tangents)):
        monkeypatch.setattr(
            module, "average_", lambda tensors, n=name: counts.update({n: counts.get(n, 0) + 1})
        )
    # The start settles on which kernels replays run, and compares the step with a replay at its
    # batch and one right before it; each of the five updates averages its validation gradient.
    others = 1 + 2 + 5
    for sync, expected in (
        (True, {"gradient": others + 10}),
        (False, {"gradient": others, "hypergradient": 5}),
    ):
        counts.clear()
        model = Model(True, inside_loss=True)
        callback = OnlineHPOCallback(
            ClipR(sync_tangents=sync),
            every_n_steps=2,
            optimizer=lambda raw: torch.optim.SGD(raw, lr=3.0),
        )
        make_trainer(callbacks=callback).fit(model)
        assert counts == expected


@pytest.mark.parametrize(
    "make", [lambda v: ClipR(sync_tangents=v), lambda v: UnrollK(3, sync_tangents=v)]
)
def test_no_bool_is_refused(make):
    with pytest.raises(TypeError, match=r"sync_tangents='no', expected True or False"):
        make("no")
