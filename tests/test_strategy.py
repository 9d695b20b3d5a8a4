"""What the callback chooses where it is told nothing, and that what is given wins."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from cases import (
    EachRank,
    Mlp,
    Stateful,
    StopAfter,
    fit,
    make_trainer,
    train_loader,
    valid_loader,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import IterableDataset

import lightning_hpo.callback as callback_module
import lightning_hpo.strategy as strategy_module
from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    ExampleWeightMixin,
    GaussianNoiseMixin,
    Hyperparameter,
    Interval,
    LabelSmoothing,
    OnlineHPOCallback,
    Positive,
    Unconstrained,
    UnitInterval,
    UnrollK,
    freeze,
    keep_probability,
    named_hyperparameters,
)
from lightning_hpo.schedule import UNKNOWN_LENGTH
from lightning_hpo.signal_to_noise import SignalToNoise
from lightning_hpo.strategy import TypicalValues, choose_estimators


def kinds(**sizes):
    """Makes hyperparameters: names that begin with ``keep`` act by masks."""
    return {
        name: keep_probability(0.5)
        if name.startswith("keep")
        else Hyperparameter(torch.full((size,), 0.1) if size > 1 else 0.1, Positive())
        for name, size in sizes.items()
    }


@pytest.mark.parametrize(
    ("sizes", "steps", "every", "expected"),
    [
        # One scalar: one product of about three gradients, a fifth of a gradient per step.
        ({"l2": 1}, 10_000, None, (15, {"ClipR": ["l2"]})),
        ({"keep": 1}, 10_000, None, (25, {"ClipR": ["keep"]})),
        ({"a": 1, "b": 1}, 10_000, None, (30, {"ClipR": ["a", "b"]})),
        # Many, or expensive for so short a training.
        (dict.fromkeys("abcdef", 1), 10_000, None, (10, {"T1T2": list("abcdef")})),
        ({"a": 7}, 10_000, None, (10, {"T1T2": ["a"]})),
        (dict.fromkeys("abcde", 1), 600, None, (10, {"T1T2": list("abcde")})),
        ({"keep_a": 1, "keep_b": 1}, 600, None, (20, {"T1T2": ["keep_a", "keep_b"]})),
        # A few of many.
        ({"a": 1, "w": 1000}, 10_000, None, (15, {"ClipR": ["a"], "T1T2": ["w"]})),
        # Short trainings have updates, too.
        ({"l2": 1}, 400, None, (15, {"ClipR": ["l2"]})),
        ({"keep_a": 2, "keep_b": 1}, 300, None, (20, {"T1T2": ["keep_a", "keep_b"]})),
        ({"l2": 1}, 10, None, (1, {"T1T2": ["l2"]})),
        ({"l2": 1}, 1, None, (1, {"T1T2": ["l2"]})),
        ({"l2": 1}, 10_000, 7, (7, {"ClipR": ["l2"]})),
        ({"a": 7}, 10_000, 3, (3, {"T1T2": ["a"]})),
    ],
)
def test_estimators_follow_from_number_kind_and_length(sizes, steps, every, expected):
    smooth = [name for name in sizes if not name.startswith("keep")]
    assigned, interval = choose_estimators(kinds(**sizes), smooth, steps, every)
    assert (interval, {type(e).__name__: names for _, e, names in assigned}) == expected


def test_tangents_have_no_radius_and_remember_a_third_of_the_training():
    ((_, clip, _),), _ = choose_estimators(kinds(l2=1), ["l2"], 9000)
    assert clip.radius == math.inf
    assert clip.decay**3000 == pytest.approx(math.exp(-1))


def test_tangents_stay_cheap_where_updates_are_frequent():
    ((_, clip, _),), every = choose_estimators(kinds(l2=1), ["l2"], 9000, 1)
    assert (every, clip.stride) == (1, 15)


class Long(pl.Callback):
    """Lets a short training look like a long one; stops it."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 40:
            trainer.should_stop = True


def run(callback, model=None, **options):
    model = Mlp(granularity="model") if model is None else model
    options = {"max_epochs": 1000, "steps": 3000, **options}
    callbacks = callback if isinstance(callback, list) else [callback]
    trainer = fit(model, [*callbacks, Long()], min_steps=1, **options)
    return model, trainer


def test_the_choice_is_said_once_and_kept(monkeypatch):
    callback = OnlineHPOCallback()
    assert callback.strategy is None
    assert callback.every_n_steps is None
    logged = []
    monkeypatch.setattr(callback_module, "rank_zero_info", logged.append)
    run(callback)
    said = [line for line in logged if "signal-to-noise" in line]
    assert said == [f"OnlineHPOCallback: {callback.strategy}"]
    assert "ClipR(radius=inf" in said[0]
    assert "for l2" in said[0]
    assert callback.every_n_steps == callback.strategy.every_n_steps == 15
    assert callback.strategy.steps == 3000
    assert callback.strategy.is_length_known
    assert [r.step for r in callback.history] == [15, 30]


@pytest.mark.parametrize(
    ("arguments", "estimator", "steps"),
    [
        ({"estimator": T1T2()}, "T1T2", range(1, 41)),
        ({"estimator": UnrollK(8)}, "UnrollK", range(8, 41, 8)),
        ({"estimator": ClipR(stride=2), "every_n_steps": 10}, "ClipR", [10, 20, 30, 40]),
        ({"every_n_steps": 20}, "ClipR", [20, 40]),
        ({"warmup_steps": 20}, "ClipR", [30]),
    ],
)
def test_what_is_given_wins(arguments, estimator, steps):
    callback = OnlineHPOCallback(**arguments)
    run(callback)
    assert [type(e).__name__ for _, e, _ in callback.strategy.assigned] == [estimator]
    assert [r.step for r in callback.history] == list(steps)
    given = arguments.get("estimator")
    assert given is None or callback.strategy.assigned[0][1] is given


def test_a_given_optimizer_wins():
    callback = OnlineHPOCallback(optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0))
    model, _ = run(callback)
    assert callback.strategy.lr is None
    assert "signal" not in str(callback.strategy)
    assert model.l2.raw == math.log(0.05)


def test_lr_zero_is_invisible():
    plain = Mlp("adam", granularity="model", init=1e-9)
    tuned = Mlp("adam", granularity="model", init=1e-9)
    run(pl.Callback(), plain)
    run(OnlineHPOCallback(lr=0.0), tuned)
    assert torch.equal(weights(plain), weights(tuned))
    assert plain.l2.raw == tuned.l2.raw


@pytest.mark.parametrize("lr", [-1.0, math.inf, math.nan])
def test_an_lr_out_of_range_is_refused(lr):
    with pytest.raises(ValueError, match="lr="):
        OnlineHPOCallback(lr=lr)


def test_lr_and_an_optimizer_of_ones_own_are_refused():
    with pytest.raises(ValueError, match=r"lr=2 scales .* set the rate of your own in optimizer="):
        OnlineHPOCallback(optimizer=lambda raw: torch.optim.SGD(raw, lr=0.1), lr=2.0)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from train_loader().dataset


def test_a_training_of_unknown_length_counts_as_ten_thousand_steps():
    callback = OnlineHPOCallback()
    loader = torch.utils.data.DataLoader(Endless(), batch_size=8)
    run(callback, train=loader, steps=-1, max_epochs=-1, min_epochs=0)
    assert callback.strategy.steps == UNKNOWN_LENGTH == 10_000
    assert not callback.strategy.is_length_known
    assert "the length of the training is not known" in str(callback.strategy)


# ----------------------------------------------------------------------------------- typical values


class Many(DropoutMixin, Mlp):
    def __init__(self, optimizer="adam", **options):
        super().__init__(optimizer, granularity="model", **options)
        self.net.insert(2, nn.Dropout(0.3))
        self.register_dropout()
        self.smooth = LabelSmoothing(0.2)
        self.sigma = Hyperparameter(0.5, Interval(0.0))

    def loss(self, batch):
        x, y = batch
        return self.smooth(self.net(x + self.sigma()), y)


class Stepped(Many):
    """Has a λ of its own that is differenced."""

    def __init__(self):
        super().__init__()
        self.own = Hyperparameter(0.5, Interval(0, 1), difference_step=1e-3)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.own()


@pytest.mark.parametrize(("estimator", "width"), [(None, 1.0), (ClipR(), 0.05)])
def test_masks_are_differenced_widely_and_nothing_else_is(estimator, width):
    callback = OnlineHPOCallback(estimator, lr=0.0)
    steps = {}

    class Spy(pl.Callback):
        def on_train_batch_end(self, *args):
            training = callback._run.training
            steps.update({name: training.difference_step(name) for name in training.in_loss})

    fit(Stepped(), [callback, Spy()], steps=2)
    assert steps == {"keep": width, "smooth.epsilon": None, "own": 1e-3, "sigma": None}


def typical_of(callback, model):
    raws = callback._phase.state["typical"]["raws"]
    known = named_hyperparameters(model)
    return {n: float(known[n].constraint(raw)) for n, raw in raws.items() if n in known}


def test_a_strength_is_typical_where_auto_would_start_it():
    found = {}
    for init in ("auto", 0.01, 1e-9):
        torch.manual_seed(0)
        model, callback = Many(init=init), OnlineHPOCallback(lr=1e-9)
        run(callback, model)
        found[init] = typical_of(callback, model)
        if init == "auto":
            assert found[init]["l2"] == pytest.approx(float(model.l2.value))
        assert found[init] == pytest.approx(
            {"l2": found["auto"]["l2"], "keep": 0.8, "smooth.epsilon": 0.1}
        )


def test_a_start_that_is_a_guess_begins_where_it_matters():
    model, callback = Mlp("adam", granularity="model", init=1e-9), OnlineHPOCallback()
    run(callback, model)
    assert callback.history[0].values["l2"] == pytest.approx(typical_of(callback, model)["l2"])


@pytest.mark.parametrize(
    ("constraint", "typical", "start", "is_guess"),
    [
        (Positive(), 1e-2, 1.1e-3, False),
        (Positive(), 1e-2, 0.9e-3, True),
        (Positive(), 1e-2, 0.11, True),
        (UnitInterval(), 0.8, 0.3, False),
        (UnitInterval(), 0.8, 0.28, True),
        (UnitInterval(), 0.8, 0.98, True),
        (Interval(0, 1), 0.1, 0.012, False),
        (Interval(0, 1), 0.1, 0.01, True),
        (Interval(0, 1), 0.1, 0.6, True),
        (Interval(0), 0.1, 0.011, False),
        (Interval(0), 0.1, 0.009, True),
        (Interval(0), 0.1, 1.1, True),
        (Interval(2.0), 2.1, 2.011, False),
        (Unconstrained(), 0.1, 100.0, False),  # nothing says on which scale
        (Positive(), None, 100.0, False),
    ],
)
def test_a_start_too_far_from_a_typical_value_is_a_guess(constraint, typical, start, is_guess):
    h = Hyperparameter(start, constraint, typical=typical)
    moved = TypicalValues({"x": h}).replace_guesses([h])
    assert moved == (["x"] if is_guess else [])
    assert float(h.value) == pytest.approx(typical if is_guess else start)


@pytest.mark.parametrize(("factor", "is_guess"), [(0.11, False), (2.9, False), (3.1, True)])
def test_a_penalty_much_too_strong_is_a_guess_earlier(factor, is_guess):
    auto, given = Mlp(granularity="model", init="auto"), Mlp(granularity="model")
    run(OnlineHPOCallback(lr=1e-9), auto)
    given.l2.value = factor * auto.l2.value
    given.l2.is_initial = True  # as if it had been made so
    run(OnlineHPOCallback(lr=1e-9), given)
    expected = auto.l2.value * (1 if is_guess else factor)
    torch.testing.assert_close(given.l2.value, expected, rtol=1e-6, atol=0)


class Noisy(GaussianNoiseMixin, Mlp):
    def __init__(self, sigma, **options):
        super().__init__("adam", granularity="model")
        self.register_noise(sigma, **options)

    def loss(self, batch):
        x, y = batch
        return super().loss((5.0 * x, y))


class Spy(pl.Callback):
    """Notes λ in the training's own steps, and the root mean square of what the network gets."""

    def __init__(self):
        self.seen, self.sizes = [], []

    def on_train_batch_start(self, trainer, model, batch, index):
        self.sizes.append(5.0 * float(batch[0].square().mean().sqrt()))

    def on_before_backward(self, trainer, model, loss):
        noise = named_hyperparameters(model)
        self.seen.append([float(h.value) for name, h in noise.items() if "noise" in name])


@pytest.mark.parametrize(("sigma", "is_guess"), [(1e-3, True), (0.5, False), (100.0, True)])
def test_noise_is_measured_by_what_it_is_added_to(sigma, is_guess):
    """Before the first step, which strong noise does not survive."""
    spy = Spy()
    run([OnlineHPOCallback(lr=1e-9), spy], Noisy(sigma))
    typical = 0.3 * spy.sizes[0]
    assert spy.seen[0][0] == pytest.approx(typical if is_guess else sigma, rel=1e-6)
    assert spy.seen[1] == pytest.approx(spy.seen[0])


def test_noise_behind_noise_is_measured_without_what_is_replaced():
    spies = [Spy(), Spy()]
    for spy, sigma in zip(spies, (1e-6, 1e6), strict=True):
        torch.manual_seed(0)
        model = Noisy(sigma, at=["net.0", "net.2"], tied=False)
        run([OnlineHPOCallback(lr=1e-9), spy], model)
    weak, strong = (spy.seen[0] for spy in spies)
    assert weak[0] == pytest.approx(0.3 * spies[0].sizes[0], rel=1e-6)
    assert 0 < weak[1] < 0.31  # of tanh
    assert strong == pytest.approx(weak, rel=0.01)


def test_a_guess_is_replaced_before_the_first_step_and_said(monkeypatch):
    said = []
    monkeypatch.setattr(strategy_module, "rank_zero_info", said.append)
    starts = {}
    for init in (1e-9, "auto"):
        torch.manual_seed(0)
        model = Many(init=init)
        model.keep.value = 0.99
        model.keep.is_initial = True  # as if it had been made so
        torch.manual_seed(0)
        run(OnlineHPOCallback(), model)
        starts[init] = weights(model)
    assert torch.equal(starts[1e-9], starts["auto"])
    assert any("keep 0.99 → 0.8" in line for line in said)
    assert any("l2 1e-09 → " in line for line in said)


@pytest.mark.parametrize(("steps", "is_replaced"), [(299, False), (300, True)])
def test_in_a_short_training_a_start_is_none(steps, is_replaced):
    model = Mlp(granularity="model", init=1e-9)
    run(OnlineHPOCallback(lr=1e-9), model, steps=steps)
    assert (float(model.l2.value) > 1e-6) == is_replaced


@pytest.mark.parametrize("is_tuned", [True, False], ids=["tuned", "plain"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("init", [1e-9, "auto"])
def test_a_dry_run_leaves_lambda_alone(init, optimizer, is_tuned):
    def train(dry):
        torch.manual_seed(0)
        model = Mlp(optimizer, granularity="model", init=init)
        start = copy.deepcopy(model.state_dict())
        if dry:
            fit(model, [OnlineHPOCallback()] if is_tuned else [], fast_dev_run=3)
            assert is_tuned or init == "auto" or float(model.l2.value) == pytest.approx(init)
            assert model.l2.is_initial
            assert model.l2.is_resolved == (init != "auto")
            model.load_state_dict(start)
        torch.manual_seed(0)
        run([OnlineHPOCallback()] if is_tuned else [], model)
        return state_of(model)

    once, twice = train(False), train(True)
    assert all(torch.equal(once[name], twice[name]) for name in once)


class SaveEarly(pl.Callback):
    """Writes a checkpoint early, and goes on."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_longer_training_goes_on_with_the_estimators_that_were_chosen(tmp_path):
    path = tmp_path / "early.ckpt"
    model, callback = Mlp(granularity="model"), OnlineHPOCallback()
    fit(model, [callback, StopAfter(30, path)], steps=60)
    assert isinstance(callback.strategy.assigned[0][1], T1T2)
    _, trainer = run(longer := OnlineHPOCallback(), Mlp(granularity="model"), ckpt_path=path)
    assert trainer.global_step == 40
    assert isinstance(longer.strategy.assigned[0][1], T1T2)
    assert longer.every_n_steps == callback.every_n_steps
    assert longer.strategy.steps == 3000
    assert [r.step for r in longer.history[:30]] == [r.step for r in callback.history]
    assert len(longer.history) == 40


def test_a_start_is_shown_by_a_training_that_was_resumed_before_the_first_update(tmp_path):
    path, tables = tmp_path / "early.ckpt", []
    for resumed in (None, path):
        callback = OnlineHPOCallback()
        callbacks = [callback] if resumed else [callback, SaveEarly(path)]
        run(callbacks, Mlp(granularity="model", init=1e-9), ckpt_path=resumed)
        tables.append(callback.summary().splitlines()[1])
    assert tables[0] == tables[1]
    assert "l2  1e-09 → " in tables[0]


def test_a_search_that_puts_everything_back_leaves_guesses(tmp_path):
    model = Mlp(granularity="model", init=1e-9)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt"))
    run(OnlineHPOCallback(lr=1e-9), model)
    assert float(model.l2.value) > 1e-6


def test_what_copies_trained_with_is_shown():
    callback = OnlineHPOCallback()
    run(copied := copy.deepcopy(callback))
    assert callback.strategy is copied.strategy is not None


def assigned(model, path):
    model.l2.value = 1e-9


def loaded(model, path):
    torch.save(Mlp(granularity="model", init=1e-9).state_dict(), path)
    model.load_state_dict(torch.load(path))


def found(model, path):
    freeze(model, {"l2": 1e-9})
    model.l2.frozen = False


def tuned(model, path):
    callback = OnlineHPOCallback(optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0))
    run(callback, model)
    model.l2.raw.fill_(math.log(1e-9))


@pytest.mark.parametrize("change", [assigned, loaded, found, tuned])
def test_what_was_not_made_so_is_no_guess(change, tmp_path):
    model = Mlp(granularity="model", init=1e-5)
    change(model, tmp_path / "state.pt")
    run(OnlineHPOCallback(lr=1e-9), model)
    assert float(model.l2.value) == pytest.approx(1e-9, rel=1e-6)


class Late(Mlp):
    """A layer gets its first gradient at the fourth step."""

    def __init__(self):
        super().__init__("adam", granularity="layer", init=1e-9)
        self.extra = nn.Linear(4, 3)
        self.register_l2(1e-9, "late", parameters=["extra.weight"])

    def loss(self, batch):
        x, y = batch
        factor = float(not self.training or self.global_step >= 3)
        return nn.functional.cross_entropy(self.net(x) + factor * self.extra(x), y)


def test_what_is_found_late_is_found_by_a_resumed_training_too(tmp_path, monkeypatch):
    monkeypatch.setattr(strategy_module, "LONG_ENOUGH", 1)

    def train(*others, path=None):
        torch.manual_seed(0)
        model, callback = Late(), OnlineHPOCallback()
        options = {"steps": 40, "max_epochs": 20, "ckpt_path": path}
        fit(model, [callback, *others], train=Stateful(), **options)
        return state(model, callback)

    stop = StopAfter(2, tmp_path / "x.ckpt")
    whole = train()
    train(stop)
    resumed = train(path=stop.path)
    assert whole[1][-1]["late"] > 2e-9  # it was found: there it drifts to
    assert torch.equal(whole[0], resumed[0])
    assert whole[1] == resumed[1]


def test_weight_decay_has_a_typical_value():
    class Decayed(Mlp):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=1e-9)

    callback = OnlineHPOCallback(optimizer_hyperparameters=["weight_decay"])
    run(callback, Decayed(granularity="model"))
    value = callback.history[0].values["optimizer.weight_decay"]
    assert value == pytest.approx(1 / (0.01 * 3000))


def test_a_constraint_that_excludes_the_typical_value_has_none():
    assert TypicalValues({"e": LabelSmoothing(0.3, Interval(0.2, 0.5)).epsilon}) == {}


# ------------------------------------------------------------------ what holds for the rest as well


class Weighted(ExampleWeightMixin, Many):
    """Few λ with tangents and many without, at once."""

    def __init__(self):
        super().__init__("adam")
        self.register_example_weights(12)

    def training_step(self, batch, batch_idx):
        x, y = batch
        index = torch.arange(len(x))
        losses = nn.functional.cross_entropy(self.net(x), y, reduction="none")
        return self.weighted_mean(losses, index) + 0.1 * self.loss(batch)


def state(model, callback):
    raws = [h.raw.flatten() for h in named_hyperparameters(model).values()]
    return torch.cat([*raws, weights(model)]), [r.values for r in callback.history]


@pytest.mark.parametrize("make", [lambda: Many(init=1e-9), Weighted], ids=["far", "weighted"])
def test_a_resumed_training_equals_one_that_never_stopped(make, tmp_path, monkeypatch):
    monkeypatch.setattr(strategy_module, "LONG_ENOUGH", 1)

    def train(*others, seed, path=None):
        torch.manual_seed(seed)
        model, callback = make(), OnlineHPOCallback(every_n_steps=3)
        options = {"steps": -1, "max_epochs": 12, "ckpt_path": path}
        fit(model, [callback, *others], enable_checkpointing=bool(others), **options)
        return state(model, callback)

    whole = train(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"), seed=0)
    resumed = train(seed=1, path=tmp_path / "epoch=6.ckpt")
    assert len(resumed[1]) == 20
    assert torch.equal(whole[0], resumed[0])
    assert whole[1] == resumed[1]


class Sharded(EachRank, Mlp):
    pass


@pytest.mark.usefixtures("within_two_minutes")
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_two_ranks_equal_one_process(optimizer):
    def train(devices):
        model = Sharded(optimizer, init=1e-9)
        callback = OnlineHPOCallback(every_n_steps=2)
        strategy = "ddp_fork" if devices > 1 else "auto"
        options = {"callbacks": [callback, Long()], "devices": devices, "strategy": strategy}
        make_trainer(3000, max_epochs=1000, min_steps=1, **options).fit(model)
        raws = torch.stack([h.raw for h in named_hyperparameters(model).values()])
        return raws, weights(model)

    (raw, theta), (raw_two, theta_two) = train(1), train(2)
    torch.testing.assert_close(raw_two, raw, rtol=1e-9, atol=0)
    torch.testing.assert_close(theta_two, theta, rtol=1e-9, atol=1e-12)
    assert (raw - math.log(1e-9)).min() > 1.0


def test_the_chosen_optimizer_is_the_one_that_is_documented():
    callback = OnlineHPOCallback()
    seen = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(type(callback._run._hyper_optimizer.optimizer))

    fit(Mlp(), [callback, Spy()], steps=2, valid=valid_loader())
    assert seen[-1] is SignalToNoise
