"""Two ranks against one process on the concatenated batch."""

import math

import lightning.pytorch as pl
import pytest
import torch
from cases import L2SP, VALID, EachRank, Mlp, OnceTanh, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    Implicit,
    OnlineHPOCallback,
    UnrollK,
    named_hyperparameters,
)
from lightning_hpo.distributed import gather

ESTIMATORS = {
    "T1T2": T1T2,
    "gTgV": lambda: T1T2(scale_by_lr=False),
    "ClipR": lambda: ClipR(2.0, decay=0.9),
    "RTHO": lambda: ClipR(math.inf),
    "forward": lambda: UnrollK(3, "forward"),
    "reverse": lambda: UnrollK(3, "reverse"),
    "Implicit": lambda: Implicit(iterations=5, damping=1.0),
}


pytestmark = pytest.mark.usefixtures("within_two_minutes")


class Sharded(EachRank, Mlp):
    pass


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


class BuiltElsewhere(Sharded):
    """Each rank has constants of its own, as where it draws its own initial weights."""

    def __init__(self, optimizer, **options):
        super().__init__(optimizer, **options)
        with torch.no_grad():
            self.net[0].weight += 0.1
        self.register_penalty(L2SP, 0.3, name="near", inside_loss=self.inside_loss)
        with torch.no_grad():
            self.net[0].weight -= 0.1

    def configure_model(self):
        for penalty in (*self.gradient_penalties, *self.loss_penalties):
            for constant in penalty.constants:
                if constant is not None:
                    constant += self.global_rank


class Hooked(BuiltElsewhere):
    """Hooks of its own: one that does not call ``super()``, one that has steps replayed at once."""

    def on_fit_start(self):
        pass

    def on_before_zero_grad(self, optimizer):
        pass


@pytest.mark.filterwarnings("error:.*the gradient differs from that of a replay")
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", [BuiltElsewhere, Hooked])
@pytest.mark.parametrize("inside_loss", [False, True])
def test_the_constants_of_a_penalty_are_those_of_the_first_rank(inside_loss, kind, accumulated):
    """As its weights are, which DDP sends to the others."""

    def run(devices):
        model = kind("momentum", inside_loss=inside_loss)
        callback = OnlineHPOCallback(ClipR(2.0), optimizer=lambda raw: torch.optim.SGD(raw, lr=3.0))
        make_trainer(
            callbacks=callback,
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            accumulate_grad_batches=accumulated,
        ).fit(model)
        theta = torch.cat([p.detach().flatten() for p in model.net.parameters()])
        return theta, model.near.raw

    for one, two in zip(run(1), run(2), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


class TwoHeads(Sharded):
    """The data of a rank say which of two heads of different sizes it uses in training."""

    def __init__(self, **options):
        super().__init__("sgd", **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.bias = torch.nn.Parameter(torch.randn(2, 3))  # its gradient is an expanded one
            self.heads = torch.nn.ModuleList(
                [
                    torch.nn.Linear(4, 3),
                    torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)),
                ]
            )

    def on_fit_start(self):
        torch.manual_seed(self.global_rank)

    def loss(self, batch):
        x, y = batch
        heads = [self.heads[self.global_rank]] if self.training else self.heads
        out = self.net(x) + sum(h(x) for h in heads) + self.bias.sum(0)
        return torch.nn.functional.cross_entropy(out, y)


@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
@pytest.mark.parametrize("make", [T1T2, lambda: ClipR(2.0)])
def test_ranks_may_use_different_parameters(make, derivatives):
    model = TwoHeads()
    callback = OnlineHPOCallback(make(), derivatives=derivatives)
    make_trainer(
        5,
        callbacks=[callback, Equal()],
        devices=2,
        strategy=DDPStrategy(start_method="fork", find_unused_parameters=True),
    ).fit(model)
    raw = torch.stack([h.raw for h in named_hyperparameters(model).values()])
    assert (raw - math.log(0.05)).abs().min() > 1e-3


class MeetsAnOperator(Sharded):
    """The second rank alone uses an operator without a second derivative, early or late."""

    def __init__(self, start=None, **options):
        super().__init__("momentum", **options)
        self.start = start

    def loss(self, batch):
        x, y = batch
        is_met = self.training and self.global_rank == 1 and self.start is not None
        activation = OnceTanh.apply if is_met and self.global_step >= self.start else torch.tanh
        return torch.nn.functional.cross_entropy(self.net[2](activation(self.net[0](x))), y)


# The latter is long enough for the gradient to be compared again.
@pytest.mark.parametrize(
    ("start", "steps"), [(0, 20), pytest.param(3, 110, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("make", [lambda: ClipR(2.0, decay=0.9), lambda: UnrollK(3, "forward")])
def test_one_rank_alone_falls_back_to_differences(make, start, steps):
    """At the start all agree; later the others stay with exact products."""
    results = []
    for first in (None, start):
        model = MeetsAnOperator(first)
        callback = OnlineHPOCallback(make(), optimizer=lambda raw: torch.optim.SGD(raw, lr=3.0))
        make_trainer(
            steps, callbacks=[callback, Equal(masks=False)], devices=2, strategy="ddp_fork"
        ).fit(model)
        results.append(torch.stack([h.raw for h in named_hyperparameters(model).values()]))
    moved = (results[0] - math.log(0.05)).norm()
    assert (results[1] - results[0]).norm() < 1e-5 * moved


# ------------------------------------------------------------------------------- what ranks share


class Apart(DropoutMixin, Sharded):
    """The ranks draw masks of their own."""

    def __init__(self, **options):
        super().__init__("momentum", **options)
        self.net.insert(2, torch.nn.Dropout(0.3))
        self.register_dropout()

    def on_fit_start(self):
        if self.trainer.ckpt_path is None:
            torch.manual_seed(self.global_rank)


class Equal(pl.Callback):
    """Raises where λ differs between the ranks after a step."""

    def __init__(self, masks=True):
        self.steps = 0
        self.masks = masks

    def on_train_batch_end(self, trainer, module, *args):
        raws = torch.stack([h.raw for h in named_hyperparameters(module).values()])
        everyone = gather(raws.clone())
        assert len(everyone) == 2
        assert torch.equal(*everyone)
        self.steps += 1

    def on_train_end(self, trainer, module):
        masks = gather(torch.rand(3))
        # The ranks did go through training with other draws.
        assert not self.masks or not torch.equal(*masks)
        assert self.steps == trainer.global_step


# Steps are looked at anew at the tenth and the hundredth.
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("ClipR", 110, marks=pytest.mark.slow),
        *((name, 20) for name in ESTIMATORS if name != "ClipR"),
    ],
)
def test_hyperparameters_are_equal_on_all_ranks_after_every_step(name, steps):
    model = Apart()
    callbacks = [OnlineHPOCallback(ESTIMATORS[name]()), Equal()]
    make_trainer(steps, callbacks=callbacks, devices=2, strategy="ddp_fork").fit(model)
    assert all(h().item() != 0.05 for h in named_hyperparameters(model).values())


class HeldOut(Apart):
    """Each rank has held-out data of its own."""

    sizes = (10, 3)

    def hpo_dataloader(self):
        n = self.sizes[self.global_rank]
        return DataLoader(TensorDataset(*(t[:n] for t in VALID)), batch_size=4)


class EmptyOnOne(HeldOut):
    sizes = (10, 0)


class IterableEmptyOnOne(HeldOut):
    def hpo_dataloader(self):
        return [] if self.global_rank else [[t[:4] for t in VALID]]


class RaisesOnOne(HeldOut):
    def hpo_dataloader(self):
        if self.global_rank == 1:
            raise FileNotFoundError("no such shard")
        return super().hpo_dataloader()


def train_with(model):
    callbacks = [OnlineHPOCallback(T1T2()), Equal()]
    make_trainer(5, callbacks=callbacks, devices=2, strategy="ddp_fork").fit(model)


def test_a_smaller_shard_of_held_out_data_is_repeated():
    model = HeldOut()
    train_with(model)
    assert all(h().item() != 0.05 for h in named_hyperparameters(model).values())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (EmptyOnOne, "T2 data of OnlineHPOCallback are empty"),
        (IterableEmptyOnOne, "T2 data of OnlineHPOCallback yield no batch"),
        (RaisesOnOne, "no such shard"),
    ],
)
def test_an_empty_shard_stops_all_ranks(kind, message):
    """None waits for the other."""
    with pytest.raises(Exception, match=message):
        train_with(kind())


@pytest.mark.slow
def test_resuming_several_ranks_equals_never_having_stopped(tmp_path):
    """Each rank goes on with its own random state."""

    def run(epochs, name, path=None):
        saving = ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=1)
        trainer = make_trainer(
            callbacks=[OnlineHPOCallback(ClipR(2.0, decay=0.9)), saving],
            devices=2,
            strategy="ddp_fork",
            enable_checkpointing=True,
            max_epochs=epochs,
            steps=-1,
        )
        trainer.fit(Apart(), ckpt_path=path)
        return torch.load(tmp_path / name / "last.ckpt", weights_only=True)

    whole = run(4, "whole")
    run(2, "half")
    resumed = run(4, "resumed", str(tmp_path / "half" / "last.ckpt"))
    assert whole["global_step"] == resumed["global_step"] == 20
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    (a,), (b,) = ([s for s in c["callbacks"].values() if "history" in s] for c in (whole, resumed))
    assert a["history"] == b["history"]
    assert not torch.equal(a["rng"]["ranks"][0]["cpu"], a["rng"]["ranks"][1]["cpu"])
