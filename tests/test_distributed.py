"""Two ranks against one process on the concatenated batch."""

import math
import signal

import pytest
import torch
from cases import BATCH, TRAIN, VALID, Mlp, make_trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK, named_hyperparameters

ESTIMATORS = {
    "T1T2": T1T2,
    "gTgV": lambda: T1T2(scale_by_lr=False),
    "ClipR": lambda: ClipR(2.0, decay=0.9),
    "RTHO": lambda: ClipR(math.inf),
    "forward": lambda: UnrollK(3, "forward"),
    "reverse": lambda: UnrollK(3, "reverse"),
}


@pytest.fixture(autouse=True)
def _timeout():
    """A hang is a failure."""

    def stop(*_):
        raise TimeoutError("two ranks did not finish within two minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Sharded(Mlp):
    """Each rank takes every n-th example, so that the ranks together see the whole batch."""

    def train_dataloader(self):
        world = self.trainer.world_size
        data = TensorDataset(*TRAIN)
        sampler = DistributedSampler(data, world, self.global_rank, shuffle=False)
        return DataLoader(data, batch_size=BATCH // world, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*VALID), batch_size=20 // self.trainer.world_size)


def train(make, devices, **options):
    model = Sharded("momentum", **options)
    callback = OnlineHPOCallback(make(), optimizer=lambda raw: torch.optim.SGD(raw, lr=3.0))
    trainer = make_trainer(
        callbacks=callback,
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        gradient_clip_val=0.3,
    )
    trainer.fit(model)
    raw = torch.stack([h.raw for h in named_hyperparameters(model).values()])
    return raw, torch.cat([p.detach().flatten() for p in model.net.parameters()])


@pytest.mark.parametrize("inside_loss", [False, True])
@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_two_ranks_equal_one_process_on_the_whole_batch(make, inside_loss):
    raw, theta = train(make, 1, inside_loss=inside_loss)
    raw_two, theta_two = train(make, 2, inside_loss=inside_loss)
    torch.testing.assert_close(raw_two, raw, rtol=1e-9, atol=0)
    torch.testing.assert_close(theta_two, theta, rtol=1e-9, atol=1e-12)
    assert (raw - math.log(0.05)).abs().min() > 1e-6
