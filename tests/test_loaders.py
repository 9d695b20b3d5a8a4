"""The held-out loader is the user's: its class, several loaders, loaders that are made anew."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
from cases import TRAIN, VALID, Mlp, fit, frozen, last_hypergradient, train_loader, valid_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback
from lightning_hpo.data import T2Stream

TWELVE = TensorDataset(torch.arange(12))


class Scaled(DataLoader):
    """Has another constructor than a DataLoader, and changes batches on their way."""

    def __init__(self, factor, dataset, batch_size):
        super().__init__(dataset, batch_size=batch_size)
        self.factor = factor

    def __iter__(self):
        for (x,) in super().__iter__():
            yield [x * self.factor]


class Ahead(DataLoader):
    """Fetches one batch ahead."""

    def __iter__(self):
        batches = super().__iter__()
        ahead = next(batches)
        for batch in batches:
            yield ahead
            ahead = batch
        yield ahead


class Collected(DataLoader):
    """Collects all batches of a pass first."""

    def __iter__(self):
        return iter(list(super().__iter__()))


class Sliced(DataLoader):
    """Has no use for a sampler."""

    def __iter__(self):
        for i in range(0, len(self.dataset), self.batch_size):
            yield [self.dataset.tensors[0][i : i + self.batch_size]]


class Repeating:
    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        while True:
            yield from iter(self.sampler)


class KeepsWorkers(DataLoader):
    """Holds one iterator for all passes, as the loaders of several detection packages do."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        object.__setattr__(self, "batch_sampler", Repeating(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self):
        return len(self.batch_sampler.sampler)

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.iterator)


def numbers(stream, n):
    return [stream.next()[0].tolist() for _ in range(n)]


def loaders():
    return {
        "scaled": Scaled(3, TWELVE, 4),
        "ahead": Ahead(TWELVE, 4),
        "collected": Collected(TWELVE, 4),
        "sliced": Sliced(TWELVE, 4),
        "keeps-workers": KeepsWorkers(TWELVE, 4),
    }


@pytest.mark.parametrize("kind", loaders())
def test_a_subclass_keeps_what_it_overrides(kind):
    loader = loaders()[kind]
    drawn = numbers(T2Stream(loader), 6)
    factor = 3 if kind == "scaled" else 1
    for k in (0, 3):
        assert sorted(itertools.chain(*drawn[k : k + 3])) == [factor * i for i in range(12)]
    if kind not in ("sliced", "collected"):
        assert drawn == [
            [factor * i for i in b] for b in numbers(T2Stream(DataLoader(TWELVE, 4)), 6)
        ]
    resumed = T2Stream(loader)
    resumed.skip_to(4)
    if kind != "collected":
        assert numbers(resumed, 2) == drawn[4:]


def test_the_iterator_that_a_loader_keeps_is_the_users():
    loader = KeepsWorkers(TWELVE, 4)
    expected = [b[0].tolist() for b in KeepsWorkers(TWELVE, 4)]
    users = iter(loader)
    first = next(users)[0].tolist()
    numbers(T2Stream(loader), 4)
    assert [first, *(b[0].tolist() for b in users)] == expected


class Persistent:
    """Wraps a loader whose workers persist: a second iterator would reset them."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def test_a_wrapped_loader_with_persistent_workers():
    loader = DataLoader(TWELVE, 4, num_workers=1, persistent_workers=True)
    wrapper = Persistent(loader)
    users = iter(loader)
    first = next(users)[0].tolist()
    stream = T2Stream(wrapper)
    assert numbers(stream, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3]]
    assert loader._iterator is users
    assert [first, *(b[0].tolist() for b in users)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


# ---------------------------------------------------------------------------------- several loaders


def shifted(shift):
    return DataLoader(TensorDataset(VALID[0] + shift, VALID[1]), batch_size=len(VALID[0]))


class OfDicts(Mlp):
    """Gets dicts of batches."""

    def validation_step(self, batch, batch_idx):
        return self.loss(batch["a"]) + self.loss(batch["b"])


def both():
    return {"a": shifted(0.0), "b": shifted(0.5)}


def tuned(model, make=T1T2, valid=None, **arguments):
    callback = OnlineHPOCallback(make(), optimizer=frozen, **arguments)
    fit(model, callback, valid=valid)
    return callback


def on_both():
    return last_hypergradient(
        tuned(
            Mlp(),
            validation_loss=lambda m, b: (
                m.loss(VALID) + m.loss([VALID[0] + 0.5, VALID[1]]) + 0 * m.loss(b)
            ),
        )
    )


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_a_combined_loader_of_the_validation(mode):
    result = last_hypergradient(tuned(OfDicts(), valid=CombinedLoader(both(), mode)))
    torch.testing.assert_close(result, on_both(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("place", ["argument", "hook"])
def test_a_combined_loader_that_is_given(place):
    given = CombinedLoader(both(), "max_size_cycle")
    model = OfDicts()
    if place == "hook":
        model.hpo_dataloader = lambda: given
    arguments = {"dataloader": given} if place == "argument" else {}
    callback = OnlineHPOCallback(T1T2(), optimizer=frozen, **arguments)
    fit(model, callback, limit_val_batches=0)
    torch.testing.assert_close(last_hypergradient(callback), on_both(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("structure", [dict, lambda d: list(d.values()), CombinedLoader])
@pytest.mark.parametrize("place", ["argument", "hook"])
def test_several_loaders_count_as_those_of_the_validation(place, structure, index):
    given = (
        structure(both()) if structure is not CombinedLoader else structure(both(), "sequential")
    )
    expected = tuned(Mlp(), dataloader=list(both().values())[index])
    model = Mlp()
    if place == "hook":
        model.hpo_dataloader = lambda: given
    arguments = {"dataloader": given} if place == "argument" else {}
    callback = tuned(model, dataloader_idx=index, **arguments)
    assert torch.equal(last_hypergradient(callback), last_hypergradient(expected))


def test_a_dict_where_the_validation_gets_dicts():
    callback = tuned(OfDicts(), valid=CombinedLoader(both(), "min_size"), dataloader=both())
    torch.testing.assert_close(last_hypergradient(callback), on_both(), rtol=1e-9, atol=0)


def test_an_index_out_of_range():
    with pytest.raises(MisconfigurationException, match=r"dataloader_idx=2, .*expected 0 to 1"):
        tuned(Mlp(), dataloader=both(), dataloader_idx=2)


# --------------------------------------------------------------------------------------- made anew


class Fresh(pl.LightningDataModule):
    """Marks its held-out data by how often they have been made."""

    def __init__(self, hook):
        super().__init__()
        self.made = 0
        if hook:
            self.hpo_dataloader = self.make

    def make(self):
        self.made += 1
        return shifted(float(self.made))

    def train_dataloader(self):
        return train_loader()

    def val_dataloader(self):
        return valid_loader() if "hpo_dataloader" in vars(self) else self.make()


@pytest.mark.parametrize("make", [T1T2, ClipR])
@pytest.mark.parametrize(
    ("every", "hook", "expected"),
    [
        (1, False, [1.0, 2.0, 3.0]),  # Lightning reloads before the validation of an epoch
        (0, False, [1.0, 1.0, 1.0]),
        (1, True, [1.0, 2.0, 3.0]),
        (2, True, [1.0, 1.0, 2.0]),
        (0, True, [1.0, 1.0, 1.0]),
    ],
)
def test_loaders_that_are_reloaded_are_followed(make, every, hook, expected):
    marks = []

    def loss(module, batch):
        marks.append((module.current_epoch, round((batch[0].mean() - VALID[0].mean()).item())))
        return module.loss(batch)

    callback = OnlineHPOCallback(make(), optimizer=frozen, validation_loss=loss)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=every,
        callbacks=callback,
    )
    trainer.fit(Mlp(), datamodule=Fresh(hook))
    by_epoch = [{mark for epoch, mark in marks if epoch == e} for e in range(3)]
    if not hook and every:
        # The new ones are there once the validation has loaded them, at the end of each epoch.
        assert by_epoch[0] == {1.0}
        assert by_epoch[2] == {2.0}
        return
    assert by_epoch == [{mark} for mark in expected]


def test_training_data_are_not_touched():
    """The loader of the training may be that of the held-out data as well."""
    loader = DataLoader(TensorDataset(*TRAIN), 4, shuffle=True)
    torch.manual_seed(1)
    plain = Mlp()
    fit(plain, train=loader, valid=loader)
    torch.manual_seed(1)
    model = Mlp()
    fit(model, OnlineHPOCallback(ClipR(), optimizer=frozen), train=loader, valid=loader)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
