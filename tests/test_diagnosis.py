"""Each warning is given where its reason is, and not in a healthy training beside it."""

from __future__ import annotations

import math
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import TRAIN, VALID, Mlp, fit, frozen, make_trainer, train_loader
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    ExampleWeightMixin,
    Hyperparameter,
    Implicit,
    IndexedDataset,
    Interval,
    L2Mixin,
    LabelSmoothing,
    LossWeightMixin,
    OnlineHPOCallback,
    Positive,
    UnitInterval,
    UnrollK,
)
from lightning_hpo import callback as callback_module
from lightning_hpo.diagnosis import FEW_UPDATES, Diagnosis, Subject, _rounded_up, _side, _trend
from lightning_hpo.monitoring import History, HistoryRecord, as_numbers, make_record
from lightning_hpo.overlap import overlap

STEPS = 60


def said_by(action):
    """Returns what the callback warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    texts = [str(w.message) for w in caught]
    return [text for text in texts if text.startswith("OnlineHPOCallback: ")]


def said(model, estimator, *, steps=STEPS, train=None, valid=None, trainer=None, **options):
    """Returns what a training warns of, and its callback."""
    callback = OnlineHPOCallback(estimator, **options)
    callbacks = [callback, *(trainer or {}).pop("callbacks", [])]
    texts = said_by(
        lambda: fit(model, callbacks, steps=steps, train=train, valid=valid, **(trainer or {}))
    )
    return texts, callback


def model(**options):
    return Mlp(**{"granularity": "model", "schedule": False, **options})


def sgd(lr):
    return lambda raw: torch.optim.SGD(raw, lr=lr)


@pytest.mark.parametrize(
    "estimator",
    [T1T2(), ClipR(20.0), ClipR(20.0, decay=0.9, stride=2), UnrollK(2), Implicit(damping=1.0)],
    ids=repr,
)
def test_a_healthy_training_warns_of_nothing(estimator):
    texts, callback = said(model(), estimator)
    assert texts == []
    assert len(callback.history) >= FEW_UPDATES


# ------------------------------------------------------------------------------------- at a bound


@pytest.mark.parametrize(("high", "side"), [(0.0501, "upper bound 0.0501"), (1e4, None)])
def test_at_a_bound(high, side):
    """λ is driven up."""
    module = model()
    module.l2.constraint = Positive(high=high)
    texts, callback = said(module, ClipR())
    assert callback.history[-1].values["l2"] == pytest.approx(min(high, 0.0727), rel=0.01)
    found = [text for text in texts if "sits at a bound" in text]
    assert len(found) == (side is not None)
    if side is not None:
        assert f"l2 at its {side}" in found[0]
        assert "wider constraint=" in found[0]
        assert f"at its {side}" in callback.summary()


@pytest.mark.parametrize(
    ("constraint", "values", "side"),
    [
        (Positive(), [1e4], "upper bound 1e+04"),
        (Positive(), [9e3], None),
        (UnitInterval(), [0.9995], "upper bound 0.999"),
        (UnitInterval(), [0.998], None),
        (UnitInterval(margin=0.1), [0.1], "lower bound 0.1"),
        (Interval(0.0), [0.0], "lower bound 0"),
        (Interval(0.0), [1e-6], None),
        (Interval(0.0, 1.0), [1.0, 1.0], "upper bound 1"),
        (Interval(0.0, 1.0), [1.0, 0.5], None),
    ],
    ids=str,
)
def test_what_a_bound_is(constraint, values, side):
    found = _side(Subject(constraint, values), torch.tensor(values))
    assert (found or "").replace("1.0e", "1e") == (side or "")


def test_decay_rates_of_an_optimizer_are_meant_to_be_close_to_one():
    chosen = Subject(UnitInterval(), 0.5, choices=(False, True))
    assert _side(chosen, torch.tensor([1 - 1e-4])) is None
    subject = Subject(UnitInterval(), [0.9, 0.999], is_option=True)
    assert _side(subject, torch.tensor([0.9995])) is None


# ----------------------------------------------------------------------------------- without update


class Stop(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


class Seldom(OnlineHPOCallback):
    def should_update(self, step):
        return False


def test_a_training_that_is_too_short_is_seen_at_its_start():
    steps_then = []

    class Watched(Mlp):
        def on_train_start(self):  # after those of the callbacks
            steps_then.append(self.trainer.global_step)
            warnings.warn("OnlineHPOCallback: the training starts", stacklevel=1)

    texts, callback = said(Watched(), UnrollK(100), steps=10)
    assert "will end after step 10" in texts[0]
    assert "after step 100 (every_n_steps=100, warmup_steps=0)" in texts[0]
    assert texts[1:] == ["OnlineHPOCallback: the training starts"]
    assert steps_then == [0]
    assert "λ is where it was" in callback.summary()


@pytest.mark.parametrize(("epochs", "warns"), [(2, True), (3, False)])
def test_the_length_in_epochs(epochs, warns):
    """Five steps each."""
    options = {"every_n_steps": 4, "warmup_steps": 8, "trainer": {"max_epochs": epochs}}
    texts, _ = said(Mlp(), T1T2(), steps=-1, **options)
    assert any("first update of λ is due after step 12" in text for text in texts) == warns


@pytest.mark.parametrize(("step", "warns"), [(7, True), (8, False)])
def test_a_training_that_stops_early_without_an_update(step, warns):
    texts, _ = said(
        Mlp(), T1T2(), every_n_steps=8, trainer={"callbacks": [Stop(step)], "min_steps": 1}
    )
    assert any("has ended after step 7" in text for text in texts) == warns
    assert len(texts) == warns


def test_a_schedule_that_never_updates():
    callback = Seldom(T1T2())
    (text,) = said_by(lambda: fit(Mlp(), callback))
    assert "no update of λ in the 10 steps" in text
    assert "should_update()" in text


@pytest.mark.parametrize("factor", [float("nan"), 1.0])
def test_only_skipped_updates(factor):
    batches = [[VALID[0] * factor, VALID[1]]]
    texts, callback = said(Mlp(), T1T2(), steps=5, dataloader=batches)
    assert ["none of the 5 updates was made" in text for text in texts[1:]] == [True] * (
        factor != 1.0
    )
    assert ("skipped updates: 100%" in callback.summary()) == (factor != 1.0)
    assert ("not moved: no hypergradient was finite" in callback.summary()) == (factor != 1.0)
    assert "settled" not in callback.summary()


@pytest.mark.parametrize(("after", "warns"), [(5, True), (15, False)])
def test_most_updates_skipped(after, warns):
    def loss(module, batch):
        return module.loss(batch) * (math.nan if module.global_step > after else 1.0)

    texts, callback = said(model(), T1T2(), steps=20, validation_loss=loss)
    assert callback.skipped == 20 - after
    found = [text for text in texts if "of the 20 updates were skipped" in text]
    assert len(found) == warns


# ---------------------------------------------------------------------------------------- same data

DATA = TensorDataset(*TRAIN)
OTHER = TensorDataset(*VALID)


class Own(Sampler):
    """A sampler of which nothing is known."""

    def __iter__(self):
        return iter(range(8))

    def __len__(self):
        return 8


def loader(data, sampler=None):
    return DataLoader(data, batch_size=4, sampler=sampler)


PARTS = random_split(DATA, [24, 16], generator=torch.Generator().manual_seed(0))
SAME = {
    "dataset": (loader(DATA), loader(DATA)),
    "part of it": (loader(DATA), loader(Subset(DATA, range(8)))),
    "indices": (loader(Subset(DATA, [1, 2, 3])), loader(Subset(DATA, [5, 3]))),
    "index tensors": (loader(Subset(DATA, torch.arange(4))), loader(Subset(DATA, [3, 9]))),
    "nested": (loader(Subset(PARTS[0], [0, 1])), loader(Subset(DATA, PARTS[0].indices[1:]))),
    "samplers": (
        loader(DATA, SubsetRandomSampler([1, 2])),
        loader(DATA, SubsetRandomSampler([2, 3])),
    ),
    "weights": (loader(DATA, WeightedRandomSampler([1.0, 0.0], 2)), loader(Subset(DATA, [0]))),
    "random": (loader(DATA, RandomSampler(DATA)), loader(PARTS[1])),
    "concatenation": (loader(ConcatDataset([OTHER, DATA])), loader(PARTS[0])),
    "indexed": (loader(IndexedDataset(DATA)), loader(DATA)),
}
APART = {
    "datasets": (loader(DATA), loader(OTHER)),
    "equal datasets": (loader(DATA), loader(TensorDataset(*TRAIN))),
    "random_split": tuple(map(loader, PARTS)),
    "indices": (loader(Subset(DATA, range(20))), loader(Subset(DATA, list(range(20, 40))))),
    "samplers": (
        loader(DATA, SubsetRandomSampler([1, 2])),
        loader(DATA, SubsetRandomSampler([3, 4])),
    ),
    "weights": (loader(DATA, WeightedRandomSampler([1.0, 0.0], 2)), loader(Subset(DATA, [1]))),
    "concatenation": (loader(ConcatDataset([OTHER, PARTS[0]])), loader(PARTS[1])),
    "unknown sampler": (loader(DATA, Own()), loader(Subset(DATA, [0]))),
}


@pytest.mark.parametrize("pair", SAME)
def test_overlapping_data(pair):
    some, others = SAME[pair]
    assert overlap([some], [others])
    assert overlap([others], [some])


@pytest.mark.parametrize("pair", APART)
def test_data_that_do_not_overlap(pair):
    some, others = APART[pair]
    assert not overlap([some], [others])
    assert overlap([some], [others], in_doubt=True) == (pair == "unknown sampler")


@pytest.mark.parametrize("where", ["validation", "argument", "hook"])
@pytest.mark.parametrize("warns", [True, False])
def test_held_out_data_that_are_training_data(where, warns):
    train, held_out = SAME["samplers"] if warns else APART["samplers"]
    module = Mlp()
    if where == "hook":
        module.hpo_dataloader = lambda: held_out
    texts, _ = said(
        module,
        T1T2(),
        steps=4,
        train=train,
        valid=held_out if where == "validation" else None,
        dataloader=held_out if where == "argument" else None,
    )
    assert [("held-out data are training data" in t, "random_split" in t) for t in texts] == [
        (True, True)
    ] * warns


# --------------------------------------------------------------------------------------- the radius


@pytest.mark.parametrize(("radius", "warns"), [(0.01, True), (20.0, False)])
def test_a_tangent_at_the_radius(radius, warns):
    texts, callback = said(model(), ClipR(radius), optimizer=frozen)
    assert len(texts) == warns
    shown = re.search(r"clipped tangents: (\d+)%", callback.summary())[1]
    norms = torch.tensor([record.tangent_norms["l2"] for record in callback.history])
    share = (norms > 0.99 * radius).double().mean().item()
    assert (share > 0.5) == warns
    assert int(shown) == round(100 * share)
    if warns:
        assert f"l2 in {shown}% of the updates" in texts[0]
        assert "larger radius=" in texts[0]


def test_a_tangent_that_is_seldom_clipped():
    """The norms grow at first: a radius that only the last ones reach."""
    _, free = said(model(), ClipR(), optimizer=frozen)
    norms = sorted(record.tangent_norms["l2"] for record in free.history)
    texts, _ = said(model(), ClipR(norms[int(0.6 * STEPS)]), optimizer=frozen)
    assert texts == []


# --------------------------------------------------------------------------------------- the effect


@pytest.mark.parametrize("estimator", [ClipR(), T1T2(), UnrollK(2)], ids=repr)
def test_no_effect_and_from_what_value_there_is_one(estimator):
    texts, _ = said(model(init=1e-8), estimator, optimizer=frozen)
    (text,) = [text for text in texts if "no measurable effect" in text]
    assert ("as windows of" in text) == (not isinstance(estimator, ClipR))
    value = start_of(text)
    assert 1e-8 < value < 0.05
    assert said(model(init=1.1 * value), estimator, optimizer=frozen)[0] == []
    (text,) = said(model(init=0.9 * value), estimator, optimizer=frozen)[0]
    assert start_of(text) > 0.9 * value


def start_of(text):
    return float(re.search(r"measurable from about ([\de.-]+)[.;, ]", text)[1].strip("."))


def test_it_starts_above_what_was_too_little():
    """Rounded down it would be the value itself."""
    assert [_rounded_up(x) for x in (0.00101, 0.99, 1.0, 2.31e-8)] == [
        *("0.0011", "0.99", "1", "2.4e-08"),
    ]


class Idle(Mlp):
    def __init__(self, scale):
        super().__init__(granularity="model", schedule=False)
        self.scale = scale
        self.shift = Hyperparameter(0.5)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss([x + self.scale * self.shift(), y])


@pytest.mark.parametrize(("scale", "warns"), [(1e-9, True), (1.0, False)])
def test_without_a_log_scale_no_value_is_named(scale, warns):
    texts, _ = said(Idle(scale), ClipR(), optimizer=frozen)
    assert len(texts) == warns
    assert not warns or ("effect" in texts[0] and "measurable from" not in texts[0])
    assert not warns or ("shift" in texts[0] and "l2" not in texts[0])


# ---------------------------------------------------------------------------------- a dead network


class Deep(L2Mixin, pl.LightningModule):
    """Deep enough to die: in a shallow one, weights of the last layer follow each batch."""

    def __init__(self, init):
        super().__init__()
        layers = [torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16)]
        self.net = torch.nn.Sequential(*layers, torch.nn.Tanh(), torch.nn.Linear(16, 3))
        self.register_l2(init=init)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


@pytest.mark.parametrize("estimator", [ClipR(), T1T2()], ids=repr)
@pytest.mark.parametrize(("init", "warns"), [(1.0, True), (0.05, False)])
def test_a_network_that_too_much_l2_has_killed(estimator, init, warns):
    texts, callback = said(Deep(init), estimator, optimizer=frozen, steps=150)
    found = [text for text in texts if "the network is dead" in text]
    assert len(found) == warns
    if warns:
        assert len(texts) == 1
        step = int(re.search(r"up to step (\d+)", found[0])[1])
        assert FEW_UPDATES <= step < callback.history[-1].step  # while there is time to stop
        assert "weaker regularization (now l2 = 1)" in found[0]


@pytest.mark.parametrize(("strength", "warns"), [(5.0, True), (0.01, False)])
def test_a_shallow_network_that_too_much_l2_has_killed(strength, warns):
    torch.manual_seed(0)
    module = model(activation=torch.nn.ReLU, init=strength)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    texts, _ = said(module, ClipR(), optimizer=frozen, steps=100)
    assert any("the network is dead" in text for text in texts) == warns


@pytest.mark.parametrize(("bias", "warns"), [(-100.0, True), (0.0, False)])
def test_units_that_are_all_dead(bias, warns):
    module = model(activation=torch.nn.ReLU, init=1e-4)
    torch.nn.init.constant_(module.net[0].bias, bias)
    texts, _ = said(module, ClipR(), optimizer=frozen)
    assert any("the network is dead" in text for text in texts) == warns
    assert len(texts) == warns


def test_a_network_that_learns_nothing_is_not_dead():
    """Its gradient reaches all of θ."""
    module = model()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-9)
    texts, _ = said(module, ClipR(), optimizer=frozen)
    assert not any("the network is dead" in text for text in texts)


# ---------------------------------------------------------------------------------------- many λ


class ManyStrengths(Mlp):
    def __init__(self, count):
        super().__init__(granularity="model", schedule=False)
        self.shift = Hyperparameter(torch.full((count - 1,), 0.1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss([x + self.shift().mean(), y])


@pytest.mark.parametrize(
    ("make", "count", "warns"),
    [
        (ClipR, 21, True),
        (ClipR, 20, False),
        (lambda: UnrollK(2, "forward"), 21, True),
        (lambda: UnrollK(30), 21, True),
        (lambda: UnrollK(2), 21, False),
        (lambda: UnrollK(30, "reverse"), 21, False),
        (T1T2, 21, False),
        (Implicit, 21, False),
    ],
)
def test_forward_tangents_of_many(make, count, warns):
    texts, _ = said(ManyStrengths(count), make(), steps=1, trainer={"fast_dev_run": True})
    assert len(texts) == warns
    if warns:
        k = getattr(make(), "k", 10)
        assert "21 products with the Hessian at each step" in texts[0]
        for remedy in ("T1T2()", f'UnrollK({k}, mode="reverse"), {k} products', "Implicit()"):
            assert remedy in texts[0]


# ------------------------------------------------------------------------------- overfitting to T2


class Weighted(ExampleWeightMixin, Mlp):
    """Tunes a weight for each example, and validates by Lightning."""

    def __init__(self):
        super().__init__(granularity="model", schedule=False, init=1e-4)
        self.l2.frozen = True
        self.register_example_weights(len(TRAIN[0]), init=0.5)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        losses = torch.nn.functional.cross_entropy(self.net(x), y, reduction="none")
        return self.weighted_mean(losses, index)

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch[:2])
        self.log("val_loss", loss)
        return loss


def tune_weights(held_out, valid, steps):
    train = DataLoader(IndexedDataset(DATA), batch_size=40)
    return said(
        Weighted(),
        T1T2(),
        steps=steps,
        train=train,
        valid=valid,
        optimizer=lambda raw: torch.optim.Adam(raw, lr=0.02),
        dataloader=held_out,
        trainer={"check_val_every_n_epoch": 10},
    )


def test_held_out_data_that_are_overfitted():
    """The labels are random: forty weights fit three examples, at the cost of all others."""
    few = DataLoader(TensorDataset(*(part[:3] for part in VALID)), batch_size=3)
    rest = DataLoader(TensorDataset(*(part[3:] for part in VALID)), batch_size=17)
    texts, callback = tune_weights(few, rest, 200)
    assert [("fitted to its held-out data" in t, "Hold out more" in t) for t in texts] == [
        (True, True)
    ]
    validations = callback._diagnosis.validations
    assert [step for step, _ in validations] == list(range(10, 201, 10))
    assert validations[-1][1] > validations[10][1]
    losses = callback.history.losses()
    assert losses[-1] < losses[100]


def test_where_validation_data_are_the_held_out_data_nothing_is_said():
    few = DataLoader(TensorDataset(*(part[:3] for part in VALID)), batch_size=3)
    for held_out in (None, DataLoader(few.dataset, batch_size=3, shuffle=True)):
        texts, callback = tune_weights(held_out, few, 40)
        assert texts == []
        assert callback._diagnosis.validations == []


def history(losses):
    return History(
        HistoryRecord(step, {"l2": 0.1}, {"l2": torch.tensor(1.0)}, None, 0, loss=loss)
        for step, loss in enumerate(losses)
    )


NOISE = 0.02 * torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DOWN = (1 - 0.005 * torch.arange(100) + NOISE).tolist()


@pytest.mark.parametrize(
    ("fresh", "tuned", "warns"),
    [
        ([1.0 + 0.01 * i for i in range(10)], DOWN, True),
        ([1.0 - 0.01 * i for i in range(10)], DOWN, False),
        ([1.0 + 0.01 * i for i in range(10)], DOWN[::-1], False),
        ([1.0, 1.01] * 5, DOWN, False),
        ([1.0 + 0.01 * i for i in range(4)], DOWN, False),
    ],
    ids=["rises", "falls", "both rise", "level", "too few"],
)
def test_what_overfitting_is(fresh, tuned, warns):
    diagnosis = Diagnosis(
        {"l2": Subject(Positive(), 0.1)},
        steps=100,
        validations=[(10 * i, loss) for i, loss in enumerate(fresh)],
    )
    texts = said_by(lambda: diagnosis.look_back(history(tuned), 0))
    assert len(texts) == warns


def test_a_trend_in_standard_errors():
    x = torch.arange(50, dtype=torch.float64)
    y = 0.01 * x + NOISE[:50]
    a = torch.stack([x, torch.ones_like(x)], 1)
    solution = torch.linalg.lstsq(a, y[:, None]).solution
    variance = (y[:, None] - a @ solution).square().sum() / 48 * torch.linalg.inv(a.T @ a)[0, 0]
    assert _trend(x, y) == pytest.approx((solution[0, 0] / variance.sqrt()).item(), rel=1e-9)


# ---------------------------------------------------------------------------------------- summary


def test_the_summary_before_a_training():
    assert "no training yet" in OnlineHPOCallback().summary()


def test_the_summary_says_what_happened(monkeypatch):
    logged = []
    monkeypatch.setattr(callback_module, "rank_zero_info", logged.append)
    _, callback = said(model(), T1T2(), optimizer=sgd(5.0), every_n_steps=2)
    text = callback.summary()
    assert logged == [text]
    lines = text.splitlines()
    assert lines[0] == f"OnlineHPOCallback: 30 updates of λ in {STEPS} steps"
    end = callback.history[-1].values["l2"]
    assert re.search(rf"l2  0\.05 → {end:.3g}  (still|settled)", lines[1])
    losses = [record.loss for record in callback.history]
    assert f"{losses[0]:.4g} → {losses[-1]:.4g}" in text
    # What does not apply is not said.
    for word in ("clipped", "skipped", "planned", "can move", "replaced"):
        assert word not in text


@pytest.mark.parametrize(
    ("path", "remark"),
    [
        ([-3.0] * 40, "settled"),
        ([-3.0 + 0.01 * t for t in range(40)], "still rising"),
        ([-3.0 - 0.01 * t for t in range(40)], "still falling"),
        ([-3.0 + 2e-4 * t for t in range(40)], "settled"),
        ([-3.0 + 0.05 * (-1) ** t for t in range(40)], "settled"),
        ([min(-3.0 + 0.05 * t, -1.5) for t in range(40)], "settled"),
        ([-3.0, -2.0], "too few updates"),
    ],
)
def test_whether_it_still_moves(path, remark):
    records = [
        HistoryRecord(t, {"l2": math.exp(raw)}, {"l2": torch.tensor((-1.0) ** t)}, None, 0)
        for t, raw in enumerate(path)
    ]
    diagnosis = Diagnosis({"l2": Subject(Positive(), math.exp(-3.0))}, steps=len(path))
    line = diagnosis.summary(History(records), 0).splitlines()[1]
    assert line.startswith(f"  l2  0.0498 → {math.exp(path[-1]):.3g}  {remark}")


@pytest.mark.parametrize("size", [1, 3, 1001])
@pytest.mark.parametrize(
    ("mean", "noise", "lr", "trend"),
    [
        (-1.0, 0.5, 1e-4, "still pulled up"),
        (-1.0, 0.5, 0.1, "still pulled up"),
        (1.0, 0.5, 0.1, "still pulled down"),
        (-1.0, 50.0, 1e-4, "settled"),
        (0.0, 0.5, 0.1, "settled"),
    ],
)
def test_settled_is_not_said_of_what_only_the_rate_holds(size, mean, noise, lr, trend):
    """Hypergradients that have a sign, however far λ has gone before; not if they are noise."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.full((size,), -3.0)
    history = History([])
    for t in range(60):
        h = mean + noise * torch.randn(size, generator=generator)
        raw = torch.where(torch.tensor(t < 40), raw - lr * h, raw)  # the rate falls to 0
        holder = Hyperparameter(raw.exp(), Positive())
        history.append(make_record(t, {"l2": holder}, {"l2": h}, None, 0, None, 1.0))
    initial = as_numbers(torch.full((size,), -3.0).exp())
    diagnosis = Diagnosis({"l2": Subject(Positive(), initial)}, steps=60)
    assert diagnosis.summary(history, 0).splitlines()[1].endswith(f"  {trend}")


def test_a_training_with_a_rate_that_is_too_small():
    for lr, word in ((1e-6, "still pulled up"), (50.0, "settled")):
        _, callback = said(model(), T1T2(), optimizer=sgd(lr), every_n_steps=2)
        assert word in callback.summary()


@pytest.mark.parametrize(
    ("course", "noise", "lowest"),
    [
        (lambda t: (t - 20) ** 2 / 400, 0.0, "0.108 around step 200"),
        (lambda t: (t - 20) ** 2 / 400, 0.1, "0.108 around step 200"),
        (lambda t: (t - 20) ** 2 / 200_000, 0.0, None),  # by less than a tenth
        (lambda t: 0.9 * math.exp(-t / 10), 0.0, None),
        (lambda t: 0.9 * math.exp(-t / 10), 0.3, None),
        (lambda t: 0.5, 0.3, None),
    ],
)
def test_a_held_out_loss_that_rises_again(course, noise, lowest):
    generator = torch.Generator().manual_seed(0)
    losses = [
        (0.1 + course(t)) * (1 + noise * torch.randn((), generator=generator).item())
        for t in range(60)
    ]
    records = [
        HistoryRecord(10 * t, {"l2": 0.1}, {"l2": torch.tensor(1.0)}, None, 0, None, loss)
        for t, loss in enumerate(losses)
    ]
    diagnosis = Diagnosis({"l2": Subject(Positive(), 0.1)}, steps=600)
    line = diagnosis.summary(History(records), 0).splitlines()[2]
    assert line.startswith("  held-out loss: ")
    if lowest is None:
        assert line.endswith("(mean of the first and last 3)")
    else:
        shown, step = re.search(r", lowest ([\d.]+) around step (\d+)$", line).groups()
        expected, at = map(float, re.findall(r"[\d.]+", lowest))
        assert float(shown) == pytest.approx(expected, rel=0.1 if noise else 0.01)
        assert abs(int(step) - at) <= (20 if noise else 0)


def test_how_far_so_few_updates_can_move():
    """The bound is one: the farthest that λ gets, all of its hypergradients being the same."""
    _, callback = said(model(), None, steps=15, every_n_steps=1)
    (factor,) = re.findall(
        r"15 updates can move a strength by a factor of about ([\d.]+) at most", callback.summary()
    )
    moved = callback.history[-1].values["l2"] / 0.05
    assert 0.7 * float(factor) < moved < float(factor)
    assert "still pulled up" in callback.summary()

    _, callback = said(model(), T1T2(), steps=20)
    assert "factor of about 1.22 at most" in callback.summary()  # 20 steps of 0.01
    for others in ({"optimizer": sgd(1.0)}, {"lr": 0.0}):
        _, callback = said(model(), T1T2(), steps=20, **others)
        assert "at most" not in callback.summary()


class StopAt(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize(("stop", "is_early"), [(20, True), (56, False), (60, False)])
def test_a_training_that_ends_early(stop, is_early):
    _, callback = said(model(), T1T2(), trainer={"callbacks": [StopAt(stop)]})
    assert callback.history[-1].step == stop
    assert (
        f"ended early, after {stop} steps (planned: 60 steps)" in callback.summary()
    ) == is_early


def test_a_start_that_was_replaced_is_said_to_be():
    _, callback = said(model(init=1e-6), None, steps=300)
    assert re.search(r"l2  1e-06 → .*, from a start that was replaced", callback.summary())
    assert "besides replacing its start" in callback.summary()


# ----------------------------------------------------------------------- λ in the held-out loss


class InBoth(Mlp):
    """λ acts in the training, and, with ``also``, in the validation."""

    def __init__(self, also):
        super().__init__(granularity="model", schedule=False)
        self.also = also

    def step(self, batch, is_training):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        return self.step(batch[:2], True)

    def validation_step(self, batch, batch_idx):
        return self.step(batch, False) if self.also else self.loss(batch)


class WithLossWeights(LossWeightMixin, InBoth):
    name = "loss_weights.size"

    def __init__(self, also):
        super().__init__(also)
        self.register_loss_weights({"size": 0.1})

    def step(self, batch, is_training):
        return self.weighted_loss(self.loss(batch), size=self.net(batch[0]).square().mean())


class WithExampleWeights(ExampleWeightMixin, InBoth):
    name = "example_weights"

    def __init__(self, also):
        super().__init__(also)
        self.register_example_weights(len(TRAIN[0]))

    def step(self, batch, is_training):
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return self.weighted_mean(losses, torch.arange(len(losses)))


class WithOwn(InBoth):
    name = "gain"

    def __init__(self, also):
        super().__init__(also)
        self.gain = Hyperparameter(1.0, Positive())

    def step(self, batch, is_training):
        return F.cross_entropy(self.gain() * self.net(batch[0]), batch[1])


class WithOwnPenalty(InBoth):
    name = "l2"

    def step(self, batch, is_training):
        loss = self.loss(batch)
        return loss if is_training else loss + self.l2() * self.net[0].weight.square().sum()


@pytest.mark.parametrize("also", [True, False])
@pytest.mark.parametrize(
    "kind", [WithLossWeights, WithExampleWeights, WithOwn, WithOwnPenalty], ids=lambda k: k.name
)
def test_a_held_out_loss_that_reads_it(kind, also):
    texts, callback = said(kind(also), T1T2(), steps=3)
    found = [text for text in texts if "the held-out loss is computed with λ itself" in text]
    assert len(found) == also  # once in three updates
    if also:
        assert f"itself: {kind.name}. " in found[0]
        assert "return the plain loss from validation_step" in found[0]
    assert len(callback.history) == 3


def test_what_acts_in_training_only_is_left_alone():
    class Plain(DropoutMixin, Mlp):
        def __init__(self):
            super().__init__(granularity="model", schedule=False, inside_loss=True)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3))
            self.register_dropout()
            self.smooth = LabelSmoothing(0.1)

        def training_step(self, batch, batch_idx):
            return self.smooth(self.net(batch[0]), batch[1]) + self.penalty()

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    texts, _ = said(Plain(), T1T2(), steps=3)
    assert not any("with λ itself" in text for text in texts)


def test_hypergradients_leave_out_what_the_held_out_loss_reads():
    """As the warning says: they are those of a loss in which λ is a constant."""

    class Added(InBoth):
        def step(self, batch, is_training):
            return self.loss(batch) + (0.0 if is_training else 3.0 * self.l2())

    found = [
        [r.hypergradients["l2"].item() for r in said(Added(also), ClipR(), steps=5)[1].history]
        for also in (True, False)
    ]
    assert found[0] == found[1]


def test_looking_costs_nothing_after_the_start_and_breaks_no_step():
    """A step may do with λ what a graph forbids; and each update takes L_V once."""
    calls = []

    class Reads(Mlp):
        def validation_step(self, batch, batch_idx):
            calls.append(self.l2().numpy().item())
            return self.loss(batch)

    counts = []
    for steps in (5, 15):
        calls.clear()
        said(Reads(granularity="model"), T1T2(), steps=steps, trainer={"limit_val_batches": 0})
        counts.append(len(calls))
    assert counts[1] - counts[0] == 10


@pytest.mark.parametrize("size", [1000, 1001])
def test_a_thousand_elements_are_one_line(size):
    class Many(Mlp):
        def __init__(self):
            super().__init__(granularity="model", schedule=False)
            self.shift = Hyperparameter(torch.full((size,), 0.1))

        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.loss([x + 1e-3 * self.shift().sum(), y])

    texts, callback = said(Many(), T1T2(), steps=FEW_UPDATES, optimizer=sgd(1.0))
    assert texts == []
    lines = callback.summary().splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) <= 100
    shift = [record.values["shift"] for record in callback.history][-1]
    mean = shift["mean"] if size > 1000 else sum(shift) / size
    assert f"shift  0.1 (0.1 … 0.1) → {mean:.3g} (" in lines[2]


def test_a_thousand_hyperparameters_are_a_few_lines():
    names = [f"layer{i}.rate" for i in range(1000)]
    values = {name: 1e-10 if i % 4 == 0 else 1e-3 for i, name in enumerate(names)}
    record = HistoryRecord(1, values, {n: torch.tensor(0.0) for n in names}, None, 0)
    diagnosis = Diagnosis({name: Subject(Positive(), 1e-3) for name in names}, steps=1)
    lines = diagnosis.summary(History([record] * 12), 0).splitlines()
    assert len(lines) == 12
    assert "and 990 more; of all 1000, 0 still move, 250 are at a bound" in lines[11]


def test_the_cost_is_the_time_in_the_callback(monkeypatch):
    """A clock that moves by 1 in each training step, and by 2 at each update."""
    now = [0.0]
    monkeypatch.setattr("lightning_hpo._stopwatch.perf_counter", lambda: now[0])

    class Slow(Mlp):
        def training_step(self, batch, batch_idx):
            now[0] += 1.0
            return super().training_step(batch, batch_idx)

    class Thorough(T1T2):
        def observe(self, step):
            now[0] += 0.5
            super().observe(step)

        def hypergradient(self, validation):
            now[0] += 1.5
            return super().hypergradient(validation)

    _, callback = said(Slow(), Thorough())
    cost = float(re.search(r"cost: ([\d.]+) times", callback.summary())[1])
    first = callback._diagnosis.clock.inside - 2.0 * STEPS  # the replay of the first batch
    assert 0 < first <= 3
    assert cost == pytest.approx(3.0 + first / STEPS, abs=0.005)


def test_the_summary_of_a_resumed_training_begins_where_it_began(tmp_path):
    def train(steps, ckpt_path=None):
        module = Mlp(granularity="model")
        held_out = DataLoader(TensorDataset(*VALID), batch_size=20)
        module.validation_step = lambda batch, batch_idx: module.log("val_loss", module.loss(batch))
        callback = OnlineHPOCallback(
            ClipR(), dataloader=held_out, validation_loss=lambda m, batch: m.loss(batch)
        )
        trainer = make_trainer(steps, callbacks=callback)
        valid = DataLoader(TensorDataset(*(part[:8] for part in TRAIN)), batch_size=8)
        trainer.fit(module, train_loader(), valid, ckpt_path=ckpt_path)
        return trainer, callback

    _, whole = train(20)
    trainer, _ = train(10)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = train(20, tmp_path / "half.ckpt")
    without_cost = [c.summary().rpartition("\n")[0] for c in (whole, resumed)]
    assert without_cost[0] == without_cost[1]
    assert "l2  0.05 → " in without_cost[0]
    states = [c.state_dict()["diagnosis"] for c in (whole, resumed)]
    assert states[0] == states[1]
    assert len(states[0]["validations"]) == 4


def test_a_second_training_warns_again():
    callback = OnlineHPOCallback(UnrollK(100))
    for _ in range(2):
        assert len(said_by(lambda: fit(Mlp(), callback, steps=3))) == 1


class WriteWarnings(pl.Callback):
    """Each process writes what it warns of to a file."""

    def __init__(self, folder):
        self.folder = folder

    def setup(self, trainer, module, stage):
        self.catching = warnings.catch_warnings(record=True)
        self.caught = self.catching.__enter__()
        warnings.simplefilter("always")

    def teardown(self, trainer, module, stage):
        self.catching.__exit__(None, None, None)
        texts = [str(w.message) for w in self.caught if "OnlineHPO" in str(w.message)]
        (self.folder / str(trainer.global_rank)).write_text("\n".join(texts))


@pytest.mark.usefixtures("within_two_minutes")
def test_the_first_of_two_processes_warns(tmp_path):
    callbacks = [WriteWarnings(tmp_path), OnlineHPOCallback(UnrollK(100))]
    fit(Mlp(), callbacks, steps=2, devices=2, strategy="ddp_fork")
    said_by_rank = [(tmp_path / str(rank)).read_text().splitlines() for rank in range(2)]
    assert [len(texts) for texts in said_by_rank] == [1, 0]
    assert "due after step 100" in said_by_rank[0][0]
