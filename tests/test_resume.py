"""A training that was interrupted and resumed against one that never stopped."""

import copy
import math
import os
import signal
import warnings
from collections import namedtuple
from dataclasses import asdict

import lightning.pytorch as pl
import pytest
import torch
from cases import (
    STEPS,
    VALID,
    FineTuned,
    Mlp,
    Stateful,
    StopAfter,
    fit,
    make_trainer,
    train_loader,
    valid_loader,
    weights,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import IterableDataset

import lightning_hpo.step.replay_check as replay_check
from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    GaussianNoiseMixin,
    Hyperparameter,
    Implicit,
    OnlineHPOCallback,
    UnrollK,
    named_hyperparameters,
)

BATCHES = 5  # per epoch

# Two epochs are ten steps: no multiple of 3 or 4, so that windows are open when training stops.
ESTIMATORS = {
    "T1T2": T1T2,
    "gTgV": lambda: T1T2(scale_by_lr=False),
    "ClipR": lambda: ClipR(radius=1.0, decay=0.9),
    "stride": lambda: ClipR(radius=1.0, decay=0.9, stride=3),
    "RTHO": lambda: ClipR(math.inf),
    "forward": lambda: UnrollK(3, "forward"),
    "reverse": lambda: UnrollK(4, "reverse"),
    "restart": lambda: UnrollK(4, "reverse", restart=True),
    "restart-forward": lambda: UnrollK(4, "forward", restart=True),
    "Implicit": lambda: Implicit(iterations=3, damping=0.1),
}


class Random(GaussianNoiseMixin, DropoutMixin, Mlp):
    """Draws random numbers, counts its batches, and keeps running statistics."""

    def __init__(self, **options):
        super().__init__("adam", inside_loss=True, **options)
        self.net.insert(2, nn.Dropout(0.3))
        self.net.insert(1, nn.BatchNorm1d(5))
        self.register_dropout()
        self.register_noise(0.1)
        self.count = 0

    def training_step(self, batch, batch_idx):
        self.count += 1
        return super().training_step(batch, batch_idx) * (1 + 0.01 * self.count)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return super().validation_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["count"] = self.count

    def on_load_checkpoint(self, checkpoint):
        self.count = checkpoint["count"]


def train(make, epochs=4, path=None, *, model=None, callback=None, others=(), **options):
    # Shuffled held-out data in small batches, so that the stream must resume as well.
    callback = callback or OnlineHPOCallback(make(), **options.pop("callback_options", {}))
    model = model or Random()
    torch.manual_seed(1 if path is None else 2)  # a new process starts with other random numbers
    trainer = fit(
        model,
        [callback, *others],
        steps=-1,
        max_epochs=epochs,
        train=options.pop("train", None) or train_loader(shuffle=True),
        valid=options.pop("valid", None) or valid_loader(batch_size=7),
        ckpt_path=None if path is None else str(path),
        **options,
    )
    return model, callback, trainer


def assert_same_runs(resumed, whole):
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(resumed[0].state_dict()[name], tensor), name
    assert len(whole[1].history) >= 2
    assert list(map(asdict, resumed[1].history)) == list(map(asdict, whole[1].history))
    assert resumed[1].skipped == whole[1].skipped
    first, last = whole[1].history[0].values, whole[1].history[-1].values
    assert all(first[name] != last[name] for name in first)  # every λ moved


class Smooth(Mlp):
    """Its replays are exact, so that differences reuse the gradients of its steps."""

    def __init__(self, inside_loss):
        super().__init__("momentum", inside_loss=inside_loss)


@pytest.mark.parametrize("inside_loss", [False, True])
@pytest.mark.parametrize("make", [ESTIMATORS["ClipR"], ESTIMATORS["stride"], ESTIMATORS["forward"]])
def test_differences_that_reuse_gradients(make, inside_loss, tmp_path, monkeypatch):
    """A resumed training goes on reusing them, and compares them at the same steps."""
    monkeypatch.setattr(replay_check, "EVERY", 7)

    def run(*args):
        options = {"callback_options": {"derivatives": "finite_difference"}}
        return train(make, *args, model=Smooth(inside_loss), **options)

    whole = run(4)
    *_, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert_same_runs(run(4, tmp_path / "half.ckpt"), whole)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_at_the_end_of_an_epoch(make, tmp_path):
    whole = train(make)
    *_, trainer = train(make, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert_same_runs(train(make, 4, tmp_path / "half.ckpt"), whole)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_within_an_epoch_with_a_stateful_loader(make, tmp_path):
    whole = train(make, train=Stateful())
    stop = StopAfter(7, tmp_path / "part.ckpt")
    train(make, train=Stateful(), others=[stop])
    assert_same_runs(train(make, 4, stop.path, train=Stateful()), whole)


def test_without_the_random_state_it_would_differ(tmp_path):
    """What the tests above rely on: the checkpoint's random state is used."""
    whole = train(T1T2)
    *_, trainer = train(T1T2, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    assert len(state.pop("rng")["ranks"]) == 1
    torch.save(checkpoint, tmp_path / "other.ckpt")
    resumed = train(T1T2, 4, tmp_path / "other.ckpt")
    assert not torch.equal(weights(resumed[0]), weights(whole[0]))


def test_twice_in_a_row(tmp_path):
    """A checkpoint that is written before the first step of a resumed training loses nothing."""

    class SaveAtStart(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "again.ckpt")

    whole = train(ESTIMATORS["reverse"])
    *_, trainer = train(ESTIMATORS["reverse"], 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    train(ESTIMATORS["reverse"], 3, tmp_path / "half.ckpt", others=[SaveAtStart()])
    assert_same_runs(train(ESTIMATORS["reverse"], 4, tmp_path / "again.ckpt"), whole)


@pytest.mark.parametrize(
    ("saving", "options"),
    [
        ({}, {}),
        ({}, {"check_val_every_n_epoch": 2}),
        ({"save_on_train_epoch_end": False}, {}),
        ({"save_on_train_epoch_end": False}, {"check_val_every_n_epoch": 2}),
        ({"save_on_train_epoch_end": True}, {"valid": [valid_loader(), valid_loader()]}),
        ({"save_on_train_epoch_end": False}, {"train": train_loader(shuffle=True, num_workers=1)}),
    ],
    ids=["default", "sparse", "after-validation", "sparse-after", "two-loaders", "workers"],
)
def test_from_a_checkpoint_that_lightning_wrote_along_the_way(saving, options, tmp_path):
    def run(path=None):
        writer = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", **saving)
        if "check_val_every_n_epoch" not in options:
            options.setdefault("num_sanity_val_steps", 2)
        return train(
            ClipR, 4, path, others=[writer], enable_checkpointing=True, **copy.copy(options)
        )

    whole = run()
    assert_same_runs(run(tmp_path / "epoch=1.ckpt"), whole)


def test_after_the_process_was_killed(tmp_path):
    """SIGKILL in the middle of a step: nothing before the last checkpoint is lost."""

    class Killed(Random):
        def training_step(self, batch, batch_idx):
            if self.count == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(batch, batch_idx)

    make = ESTIMATORS["reverse"]
    whole = train(make)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    pid = os.fork()
    if pid == 0:
        try:
            train(make, model=Killed(), others=[saving], enable_checkpointing=True)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert 0 < checkpoint["global_step"] < 4 * BATCHES
    assert_same_runs(train(make, 4, tmp_path / "last.ckpt"), whole)


def test_after_skipped_updates(tmp_path):
    x, y = VALID
    held_out = [[x * math.nan if k == 1 else x, y] for k in range(5)]
    options = {"callback_options": {"dataloader": held_out}}
    whole = train(ClipR, **options)
    *_, trainer = train(ClipR, 2, **options)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = train(ClipR, 4, tmp_path / "half.ckpt", **options)
    for a, b in zip(resumed[1].history, whole[1].history, strict=True):
        assert (a.step, a.values, a.skipped) == (b.step, b.values, b.skipped)
    assert resumed[1].skipped == whole[1].skipped == 4


def test_held_out_data_that_are_drawn_at_random_in_the_process(tmp_path):
    class Drawn(IterableDataset):
        def __iter__(self):
            x, y = VALID
            for _ in range(3):
                order = torch.randperm(len(x))[:6]
                yield [x[order] + 0.1 * torch.randn(6, 4), y[order]]

    def loader():
        return torch.utils.data.DataLoader(Drawn(), batch_size=None)

    whole = train(T1T2, callback_options={"dataloader": loader()})
    *_, trainer = train(T1T2, 2, callback_options={"dataloader": loader()})
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    path = tmp_path / "half.ckpt"
    assert_same_runs(train(T1T2, 4, path, callback_options={"dataloader": loader()}), whole)


Pair = namedtuple("Pair", "x y")


def test_a_window_that_a_checkpoint_cannot_hold_makes_no_update(tmp_path):
    """Batches of a class of the user's are not saved: the window's first steps are lost."""

    def named():
        return train_loader(
            collate_fn=lambda items: Pair(*map(torch.stack, zip(*items, strict=True)))
        )

    make = ESTIMATORS["reverse"]
    whole = train(make, train=named(), model=Mlp("adam", inside_loss=True))
    *_, trainer = train(make, 2, train=named(), model=Mlp("adam", inside_loss=True))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.warns(UserWarning, match="no λ update at its end"):
        resumed = train(
            make, 4, tmp_path / "half.ckpt", train=named(), model=Mlp("adam", inside_loss=True)
        )
    assert [r.step for r in whole[1].history] == [4, 8, 12, 16, 20]
    assert [r.step for r in resumed[1].history] == [4, 8, 16, 20]
    assert resumed[1].history[:2] == whole[1].history[:2]


def test_an_open_accumulation_is_dropped_as_its_gradient_is(tmp_path):
    """Lightning saves no ``.grad``: the next step sees the remaining micro-batches alone."""

    class StopWithin(StopAfter):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (0, 2):
                trainer.save_checkpoint(self.path)
                trainer.should_stop = True

    def run(make, epsilon=None):
        stop = StopWithin(0, tmp_path / "within.ckpt")
        options = {"accumulate_grad_batches": 2, "train": Stateful(), "valid": valid_loader()}
        callback_options = {"optimizer": lambda raw: torch.optim.SGD(raw, lr=0.0)}
        raw = None if epsilon is None else [math.log(0.05) + epsilon] * 2
        model = [Mlp("momentum", inside_loss=True, raw=raw) for _ in range(2)]
        train(make, 1, model=model[0], others=[stop], callback_options=callback_options, **options)
        options["train"] = Stateful()
        _, callback, _ = train(
            make, 1, stop.path, model=model[1], callback_options=callback_options, **options
        )
        with torch.no_grad():
            return callback, model[1].loss(VALID).item()

    # Steps: batches 0 and 1; then, after the interruption within the second, batch 3 alone; 4.
    callback, _ = run(lambda: ClipR(math.inf))
    assert [r.step for r in callback.history] == [1, 2, 3]
    found = sum(callback.history[-1].hypergradients.values()).item()
    epsilon = 1e-4
    up, down = (run(T1T2, sign * epsilon)[1] for sign in (1, -1))
    assert found == pytest.approx((up - down) / (2 * epsilon), rel=1e-5)


# ---------------------------------------------------------------------------------- what is refused


def saved(tmp_path, make=T1T2, model=None):
    *_, trainer = train(make, 2, model=model or Mlp("adam"))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    return tmp_path / "half.ckpt"


class Lenient(Mlp):
    """Lets Lightning load a state that has other hyperparameters."""

    strict_loading = False


def test_other_hyperparameters_are_refused(tmp_path):
    path = saved(tmp_path)
    model = Lenient("adam", granularity="model")
    before = weights(model).clone()
    with pytest.raises(
        MisconfigurationException,
        match=r"checkpoint tunes 'l2\.net\.0', 'l2\.net\.2', this training 'l2'\. .*strict=False",
    ):
        train(T1T2, 4, path, model=model)
    assert len(before) == len(weights(model))


def test_another_number_of_lambda_is_refused(tmp_path):
    class Weighed(Lenient):
        def __init__(self, n):
            super().__init__("adam")
            self.scale = nn.Module()
            self.scale.w = Hyperparameter(torch.ones(n))

        def training_step(self, batch, batch_idx):
            return self.loss(batch) * self.scale.w().mean()

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"].pop("scale.w.raw")

    path = saved(tmp_path, model=Weighed(3))
    with pytest.raises(
        MisconfigurationException, match=r"'scale\.w' of shape \(3,\).*'scale\.w' of shape \(4,\)"
    ):
        train(T1T2, 4, path, model=Weighed(4))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (T1T2, ClipR, "written by the estimator T1T2, this training uses ClipR"),
        (
            lambda: UnrollK(3, "forward"),
            lambda: UnrollK(3, "reverse"),
            r"UnrollK\(3, 'forward'\), this training uses UnrollK\(3, 'reverse'\)",
        ),
        (
            lambda: UnrollK(4, "reverse"),
            lambda: UnrollK(3, "reverse"),
            r"UnrollK\(4, 'reverse'\), this training uses UnrollK\(3, 'reverse'\)",
        ),
    ],
)
def test_another_estimator_is_refused(before, after, message, tmp_path):
    path = saved(tmp_path, before)
    with pytest.raises(MisconfigurationException, match=message):
        train(after, 4, path, model=Mlp("adam"))


def test_another_optimizer_of_lambda_is_refused(tmp_path):
    path = saved(tmp_path)
    options = {"optimizer": lambda raw: torch.optim.SGD(raw, lr=0.1, momentum=0.9)}
    with pytest.raises(MisconfigurationException, match="λ-optimizer Adam, this training uses SGD"):
        train(T1T2, 4, path, model=Mlp("adam"), callback_options=options)
    options["strict"] = False
    _, callback, _ = train(T1T2, 4, path, model=Mlp("adam"), callback_options=options)
    assert len(callback.history) == 20


@pytest.mark.parametrize("make", [ClipR, lambda: UnrollK(3, "forward"), T1T2])
def test_fine_tuning_goes_on(make, tmp_path):
    """The optimizer gets the parameters of the backbone only in the resumed part."""

    def run(epochs, path=None):
        unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        return train(make, epochs, path, model=FineTuned(), others=[unfreeze])

    whole = run(3)
    *_, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "frozen.ckpt")
    assert_same_runs(run(3, tmp_path / "frozen.ckpt"), whole)


def test_what_does_not_fit_starts_anew_where_strictness_is_waived(tmp_path):
    path = saved(tmp_path)
    for make, model in ((ClipR, Mlp("adam")), (T1T2, Lenient("adam", granularity="model"))):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            _, callback, _ = train(make, 4, path, model=model, callback_options={"strict": False})
        assert [r.step for r in callback.history] == list(range(1, 21))
        assert set(callback.history[-1].values) == set(named_hyperparameters(model))


def test_a_strictness_that_is_no_flag_is_refused():
    with pytest.raises(TypeError, match="strict='yes', expected True or False"):
        OnlineHPOCallback(strict="yes")


# ------------------------------------------------------------------------ with and without callback


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_checkpoint_loads_without_pickled_code(make, tmp_path):
    checkpoint = torch.load(saved(tmp_path, make, Random()), weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    assert state["steps"] == 10
    assert len(state["history"]) > 0
    assert "l2.net.0.raw" in checkpoint["state_dict"]


def test_a_training_without_the_callback_goes_on_with_it(tmp_path):
    model = Mlp("adam")
    trainer = fit(model, steps=-1, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    _, callback, _ = train(T1T2, 2, tmp_path / "plain.ckpt", model=Mlp("adam"))
    assert [r.step for r in callback.history] == [6, 7, 8, 9, 10]  # those of the trainer


def test_a_training_with_the_callback_goes_on_without_it(tmp_path):
    path = saved(tmp_path)
    tuned = torch.load(path, weights_only=True)["state_dict"]
    model = Mlp("adam")
    trainer = fit(model, steps=-1, max_epochs=4, ckpt_path=str(path))
    assert trainer.global_step == 20
    for name, h in named_hyperparameters(model).items():
        assert torch.equal(h.raw, tuned[f"{name}.raw"])
        assert h().item() != 0.05


def test_a_checkpoint_before_the_first_step_holds_nothing():
    trainer = make_trainer(callbacks=OnlineHPOCallback())
    (callback,) = (c for c in trainer.callbacks if isinstance(c, OnlineHPOCallback))
    assert callback.state_dict() == {}
    callback.load_state_dict({})
    trainer.fit(Mlp(), train_loader(), valid_loader())
    assert len(callback.history) == STEPS
