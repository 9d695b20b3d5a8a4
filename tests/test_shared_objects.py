"""Held-out batches leave nothing in the objects that they share with the training's loaders."""

import functools
import itertools
import random
import types
import warnings
import weakref

import drawing
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from cases import TRAIN, VALID, Mlp, fit, frozen, weights
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, private_state
from lightning_hpo.data import T2Stream

GLOBAL = np.random.default_rng(5)


class Noisy(Dataset):
    """Adds noise of a generator of its own, and counts."""

    def __init__(self, draw, seed=True):
        self.draw = draw
        self.count = 0
        self.cache = {}

    def __len__(self):
        return 20

    def __getitem__(self, i):
        self.count += 1
        self.cache[i] = self.count
        return TRAIN[0][i] + 0.1 * self.draw() + 0.01 * self.count, TRAIN[1][i]


class Slotted:
    __slots__ = ("position", "values")

    def __init__(self):
        self.values = [0.1, 0.5, 0.3, 0.9, 0.2]
        self.position = 0

    def __call__(self):
        self.position += 1
        return self.values[self.position % 5]


class LateSlot:
    """Whose slot is empty until it is first called."""

    __slots__ = ("__weakref__", "position")

    def __call__(self):
        self.position = getattr(self, "position", 0) + 1
        return (self.position % 7) / 7


KEPT = []


def proxy():
    KEPT[:] = [LateSlot()]
    return weakref.proxy(KEPT[0])


def closure():
    position = 0

    def draw():
        nonlocal position
        position += 1
        return (position % 7) / 7

    return draw


class Counting:
    def __init__(self, count):
        self.count = count

    def __call__(self):
        return next(self.count) % 1


class Cycling:
    def __init__(self):
        self.iterator = iter([k / 50 for k in range(2000)])

    def __call__(self):
        return next(self.iterator)


def from_global():
    return GLOBAL.random()


def torch_generator():
    generator = torch.Generator().manual_seed(2)
    return lambda: torch.rand((), generator=generator).double()


def bound():
    return np.random.RandomState(3).rand


def from_module():
    return drawing.RNG.random()


def from_function_of_module():
    import drawing as other

    return other.draw()


class OfClass:
    """Its class counts, and holds a generator."""

    calls = 0

    def __init__(self):
        OfClass.calls, OfClass.rng = 0, np.random.default_rng(4)

    def __call__(self):
        OfClass.calls += 1
        return self.rng.random() + 0.01 * OfClass.calls


def of_many():
    """Each of many transforms has its own, beside an index of tuples."""
    generators = [random.Random(k) for k in range(150)]
    index = [[(i, j) for j in range(60)] for i in range(60)]
    return lambda: generators[len(index) + 60].random()


DRAWS = {
    "module": lambda: from_module,
    "function of a module": lambda: from_function_of_module,
    "class": OfClass,
    "many": of_many,
    "torch": torch_generator,
    "numpy": lambda: np.random.default_rng(1).random,
    "numpy-old": bound,
    "numpy-by-attribute": lambda: functools.partial(_normal, np.random.default_rng(1)),
    "python": lambda: random.Random(3).random,
    "slots": Slotted,
    "proxy": proxy,
    "closure": closure,
    "iterator": Cycling,
    "count": lambda: Counting(itertools.count(0, 0.01)),
    "global": lambda: from_global,
    "array": lambda: Rolling(np.zeros(1)),
    "tensor": lambda: Rolling(torch.zeros(1)),
}


def _normal(generator):
    return generator.normal()


class Rolling:
    def __init__(self, state):
        self.state = state

    def __call__(self):
        self.state += 0.3
        return float(self.state[0]) % 1


class Data(pl.LightningDataModule):
    """Training and validation share whatever makes their batches."""

    def __init__(self, make):
        super().__init__()
        drawing.RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state
        GLOBAL.bit_generator.state = np.random.default_rng(5).bit_generator.state
        self.loaders = make()

    def train_dataloader(self):
        return self.loaders[0]

    def val_dataloader(self):
        return self.loaders[1]


class Logged(Mlp):
    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss


def run(make, estimator):
    model = Logged("momentum", schedule=False)
    torch.manual_seed(4)
    callbacks = [] if estimator is None else [OnlineHPOCallback(estimator, optimizer=frozen)]
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
    )
    trainer.fit(model, datamodule=Data(make))
    if callbacks:
        assert len(callbacks[0].history) == trainer.global_step
    return weights(model), trainer.callback_metrics["val_loss"]


def assert_invisible(make):
    plain = run(make, None)
    for estimator in (T1T2(), ClipR()):
        assert all(map(torch.equal, run(make, estimator), plain))


def shared_dataset(draw, kind=Noisy):
    dataset = kind(draw())
    return DataLoader(dataset, 4), DataLoader(dataset, 4)


@pytest.mark.parametrize("name", DRAWS)
def test_a_dataset_with_a_state_of_its_own(name):
    assert_invisible(lambda: shared_dataset(DRAWS[name]))


@pytest.mark.parametrize("name", ["torch", "numpy", "closure", "slots", "global"])
def test_a_collator_with_a_state_of_its_own(name):
    def make():
        draw = DRAWS[name]()

        def collate(items):
            batch = torch.utils.data.default_collate(items)
            return [batch[0] + draw(), batch[1]]

        dataset = TensorDataset(*TRAIN)
        return tuple(DataLoader(dataset, 4, collate_fn=collate) for _ in range(2))

    assert_invisible(make)


class Walking(Sampler):
    """Goes on where it was left."""

    def __init__(self, n, count):
        self.n, self.count, self.position = n, count, 0

    def __iter__(self):
        for _ in range(self.count):
            self.position += 1
            yield self.position * 7 % self.n

    def __len__(self):
        return self.count


class Endless(Sampler):
    def __init__(self, n, batch=None):
        self.n, self.batch, self.position = n, batch, 0

    def __iter__(self):
        while True:
            self.position += 1
            first = self.position * 7 % self.n
            yield first if self.batch is None else [first] * self.batch


def generator():
    return torch.Generator().manual_seed(6)


SAMPLERS = {
    "weighted": lambda: WeightedRandomSampler([1.0] * 20, 20, generator=generator()),
    "subset": lambda: SubsetRandomSampler(range(12), generator=generator()),
    "walking": lambda: Walking(20, 16),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_with_a_state_of_its_own(name):
    def make():
        sampler = SAMPLERS[name]()
        dataset = TensorDataset(*TRAIN)
        return tuple(DataLoader(dataset, 4, sampler=sampler) for _ in range(2))

    assert_invisible(make)


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_endless_samplers(kind):
    """They are drawn from as far as is needed, and a copy of them at that."""
    size = {"batch_size": 4} if kind == "sampler" else {}
    sampler = Endless(20, None if kind == "sampler" else 4)
    loader = DataLoader(TensorDataset(torch.arange(20)), **{kind: sampler}, **size)
    stream = T2Stream(loader)
    drawn = [stream.next()[0].tolist() for _ in range(6)]
    walk = [k * 7 % 20 for k in range(1, 25)]
    if kind == "sampler":
        assert drawn == [walk[i : i + 4] for i in range(0, 24, 4)]
    else:
        assert drawn == [[k] * 4 for k in walk[:6]]
    assert sampler.position == 0
    resumed = T2Stream(loader)
    resumed.skip_to(4)
    assert [resumed.next()[0].tolist() for _ in range(2)] == drawn[4:]
    ranks = [T2Stream(loader, rank=r, world_size=2) for r in (0, 1)]
    together = [stream.next()[0].tolist() for _ in range(3) for stream in ranks]
    assert together == drawn


def test_an_endless_sampler_of_the_validation():
    def make():
        dataset = TensorDataset(*TRAIN)
        return DataLoader(dataset, 4), DataLoader(dataset, 4, sampler=Endless(20))

    model = Mlp()
    callback = OnlineHPOCallback(ClipR(), optimizer=frozen)
    fit(model, callback, valid=make()[1], limit_val_batches=2)
    assert len(callback.history) == 10


def test_an_iterable_dataset_that_holds_its_position():
    class Stream(IterableDataset):
        def __init__(self):
            self.position = 0

        def __iter__(self):
            for _ in range(5):
                self.position += 1
                i = self.position * 3 % 16
                yield TRAIN[0][i : i + 4], TRAIN[1][i : i + 4]

    def make():
        dataset = Stream()
        return tuple(DataLoader(dataset, batch_size=None) for _ in range(2))

    assert_invisible(make)


def test_an_empty_slot_is_emptied_again():
    draw = LateSlot()
    T2Stream(DataLoader(Noisy(draw), 4)).next()
    assert not hasattr(draw, "position")


class Settings:
    """As configurations of other packages, does something when it is asked for what it lacks."""

    __slots__ = ("__dict__", "empty")

    def __init__(self):
        self.cache = {}
        self.flags = None

    def __getattr__(self, name):
        self.flags = self.cache[name] = True
        raise AttributeError(name)


class Foreign:
    """As functions of Boost.Python, says that it is of another class."""

    __class__ = property(lambda self: types.BuiltinMethodType)

    def __call__(self):
        return 0.3


def dead():
    return weakref.proxy(LateSlot())


@pytest.mark.parametrize("make", [Settings, Foreign, dead])
def test_objects_are_looked_at_without_being_asked(make):
    class Holding(Noisy):
        def __init__(self, other):
            super().__init__(lambda: 0.0)
            self.other = other

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="OnlineHPOCallback")
        warnings.filterwarnings("ignore", message=".*held-out data are training data")
        held = []

        def loaders():
            held.append(make())
            return shared_dataset(lambda: held[-1], kind=Holding)

        assert_invisible(loaders)
    if make is Settings:
        assert all((each.cache, each.flags) == ({}, None) for each in held)


def test_a_private_state_goes_on():
    """Held-out batches see what earlier ones left, and not what the user's loaders did since."""
    dataset = Noisy(lambda: 0.0)
    stream = T2Stream(DataLoader(dataset, 4))
    stream.next()
    stream.next()
    assert (dataset.count, dataset.cache) == (0, {})
    dataset[0]
    assert dataset.count == 1
    first = stream.next()[0]
    again = T2Stream(DataLoader(Noisy(lambda: 0.0), 4))
    for _ in range(3):
        expected = again.next()[0]
    assert torch.equal(first, expected)
    assert (dataset.count, list(dataset.cache)) == (1, [0])


def test_what_the_user_sets_is_seen():
    dataset = Noisy(lambda: 0.0)
    stream = T2Stream(DataLoader(dataset, 4))
    before = stream.next()[0]
    dataset.draw = lambda: 1e6
    assert before.abs().max() < 1e3 < stream.next()[0].abs().min()


def stream():
    return (k / 500 for k in range(2000))


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda: Counting(stream()), "'count', a generator"),
        (lambda: Counting(itertools.cycle([0.1, 0.2])), "'count', a cycle"),
        (lambda: functools.partial(next, stream()), "a generator"),
        (lambda: stream().__next__, "a generator"),
    ],
)
def test_an_iterator_that_cannot_be_copied_is_named(draw, name):
    with pytest.warns(UserWarning, match=rf"{name}.*Pass dataloader="):
        run(lambda: shared_dataset(draw), T1T2())


def test_ordinary_data_are_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = T2Stream(DataLoader(TensorDataset(*VALID), 4, shuffle=True))
        stream.next()


# ---------------------------------------------------------------------------------- transfer hooks


class Hooked(Logged):
    """Draws numbers and counts in the hook that is named."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.counts = 0
        self.own = torch.Generator().manual_seed(1)

    def disturb(self, batch):
        self.counts += 1
        noise = torch.randn_like(batch[0]) + torch.randn(4, generator=self.own, dtype=torch.double)
        return [batch[0] + 0.1 * noise + 0.01 * self.counts, batch[1]]


class Before(Hooked):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return self.disturb(batch)


class Transfer(Hooked):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return self.disturb(super().transfer_batch_to_device(batch, device, dataloader_idx))


class After(Hooked):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.disturb(batch)


class Elsewhere(Logged):
    """Draws from a generator of another file, and from a global one in a list."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        drawing.RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state
        GENERATORS[:] = [random.Random(1)]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 0.1 * drawing.draw() + 0.1 * GENERATORS[0].random(), batch[1]]


GENERATORS = []


class DataHooks(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.own = np.random.default_rng(2)
        self.counts = 0

    def train_dataloader(self):
        return DataLoader(TensorDataset(*TRAIN), 4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*VALID), 4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.counts += 1
        noise = torch.randn_like(batch[0]) + self.own.random()
        return [batch[0] + noise + 0.01 * self.counts, batch[1]]


@pytest.mark.parametrize("kind", [Before, Transfer, After, Elsewhere, Logged])
def test_transfer_hooks_leave_nothing(kind):
    def trained(estimator):
        torch.manual_seed(3)
        model = kind("momentum")
        data = (
            DataHooks()
            if kind is Logged
            else Data(lambda: (DataHooks().train_dataloader(), DataHooks().val_dataloader()))
        )
        callbacks = [] if estimator is None else [OnlineHPOCallback(estimator, optimizer=frozen)]
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        trainer.fit(model, datamodule=data)
        return weights(model), trainer.callback_metrics["val_loss"]

    plain = trained(None)
    for estimator in (T1T2(), ClipR()):
        assert all(map(torch.equal, trained(estimator), plain))


def test_a_cache_of_draws_is_named():
    """What is drawn for a held-out batch is what the training finds in the cache."""
    draw = functools.lru_cache(random.Random(3).gauss)

    class Cached(Noisy):
        def __getitem__(self, i):
            return TRAIN[0][i] + 0.1 * draw(0.0, i + 1.0), TRAIN[1][i]

    def make():
        return shared_dataset(lambda: None, kind=Cached)

    with pytest.warns(UserWarning, match="fill the cache of .*gauss.*which draws"):
        run(make, T1T2())


def test_more_objects_than_are_looked_through_are_named(monkeypatch):
    monkeypatch.setattr(private_state, "_OBJECTS", 5)
    with pytest.warns(UserWarning, match="reach more than 5 objects by way of"):
        run(lambda: tuple(DataLoader(TensorDataset(*TRAIN), 4) for _ in range(2)), T1T2())
