"""The stream of held-out batches: endless, seeded, resumable, and of the user's choice."""

import itertools
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from cases import VALID, Mlp, Recorder, fit, frozen, make_trainer, observe, train_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_hpo import T1T2, OnlineHPOCallback
from lightning_hpo.data import T2Stream


class Indices(Dataset):
    """Example i is i, so that a batch shows what was drawn."""

    def __init__(self, n=12):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i


class Augmented(Indices):
    """Draws from every generator that a transform may use."""

    def __getitem__(self, i):
        return torch.tensor([i, torch.rand(()), np.random.rand(), random.random()])  # noqa: NPY002


class Forever(IterableDataset):
    def __iter__(self):
        return iter(range(5))


def take(stream, n):
    return [stream.next().tolist() for _ in range(n)]


def joined(batches):
    return list(itertools.chain.from_iterable(batches))


def stream(loader=None, n=12, batch_size=4, **options):
    return T2Stream(DataLoader(Indices(n), batch_size) if loader is None else loader, **options)


# ------------------------------------------------------------------------------------ what is drawn


def test_a_batch_is_a_function_of_the_seed_and_its_number():
    first = take(stream(seed=3), 7)
    assert take(stream(seed=3), 7) == first
    assert take(stream(seed=4), 7) != first
    later = stream(seed=3)
    later.skip_to(5)
    assert take(later, 2) == first[5:]
    assert later.consumed == 7
    # Whether the user's loader shuffles has no influence.
    assert take(stream(DataLoader(Indices(), 4, shuffle=True), seed=3), 7) == first


def test_peeking_consumes_nothing():
    peeking = stream()
    expected = take(stream(), 3)
    assert peeking.peek().tolist() == peeking.peek().tolist() == expected[0]
    assert peeking.consumed == 0
    assert take(peeking, 3) == expected


def test_every_pass_shows_all_examples_in_a_new_order():
    drawn = take(stream(), 6)
    first, second = joined(drawn[:3]), joined(drawn[3:])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_batches_run_on_across_passes():
    """No batch is smaller than the others: 5 batches of 4 are two passes over 10 examples."""
    drawn = take(stream(n=10), 5)
    assert [len(batch) for batch in drawn] == [4] * 5
    together = joined(drawn)
    assert sorted(together[:10]) == sorted(together[10:]) == list(range(10))


@pytest.mark.parametrize("n", [12, 10])
def test_two_ranks_share_each_batch_out(n):
    ranks = [take(stream(n=n, batch_size=2, rank=r, world_size=2, seed=1), 6) for r in (0, 1)]
    whole = take(stream(n=n, batch_size=4, seed=1), 6)
    for mine, others, together in zip(*ranks, whole, strict=True):
        assert mine + others == together


def test_two_ranks_never_see_the_same_example_in_a_pass():
    drawn = [joined(take(stream(batch_size=2, rank=r, world_size=2), 3)) for r in (0, 1)]
    assert set(drawn[0]) & set(drawn[1]) == set()
    assert sorted(drawn[0] + drawn[1]) == list(range(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_never_having_stopped(workers):
    loader = DataLoader(Indices(10), 4, num_workers=workers)
    uninterrupted = take(stream(loader), 8)
    stopped = stream(loader)
    assert take(stopped, 3) == uninterrupted[:3]
    stopped.peek()  # a peeked batch counts as not consumed
    resumed = stream(loader)
    resumed.skip_to(stopped.consumed)
    assert take(resumed, 5) == uninterrupted[3:]
    # Going back and forth in the same stream, whose workers have prefetched.
    stopped.skip_to(1)
    assert take(stopped, 2) == uninterrupted[1:3]


def test_workers_draw_the_same_batches_as_the_main_process():
    assert take(stream(DataLoader(Indices(), 4, num_workers=2)), 4) == take(stream(), 4)


def test_random_transforms_resume_as_well():
    """Each batch seeds the generators that its transforms draw from."""
    loader = DataLoader(Augmented(), 4)
    uninterrupted = take(stream(loader), 5)
    resumed = stream(loader)
    resumed.skip_to(3)
    assert take(resumed, 2) == uninterrupted[3:]
    noises = [row[1] for batch in uninterrupted for row in batch]
    assert len(set(noises)) == len(noises)


# ------------------------------------------------------------------------------- the user's choices


def test_a_subset_stays_a_subset():
    chosen = [1, 4, 7, 8]
    loader = DataLoader(Indices(), 2, sampler=SubsetRandomSampler(chosen))
    drawn = take(stream(loader), 4)
    assert sorted(joined(drawn[:2])) == sorted(joined(drawn[2:])) == chosen


def test_a_batch_sampler_keeps_its_batches():
    batches = [[0, 1, 2], [5, 6], [9]]
    loader = DataLoader(Indices(), batch_sampler=batches)
    drawn = take(stream(loader), 6)
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == batches


def test_a_batch_sampler_of_torch_keeps_its_batches():
    sampler = BatchSampler(range(4, 10), batch_size=3, drop_last=False)
    drawn = take(stream(DataLoader(Indices(), batch_sampler=sampler)), 2)
    assert sorted(joined(drawn)) == list(range(4, 10))


def test_without_automatic_batching():
    """The items of the dataset are the batches."""

    class Batches(Indices):
        def __getitem__(self, i):
            return torch.tensor([i, 10 * i])

    drawn = take(stream(DataLoader(Batches(4), batch_size=None)), 8)
    assert sorted(drawn[:4]) == sorted(drawn[4:]) == [[0, 0], [1, 10], [2, 20], [3, 30]]


def test_a_dataset_smaller_than_a_batch():
    drawn = take(stream(n=3, batch_size=8), 2)
    assert [sorted(batch) for batch in drawn] == [[0, 1, 2]] * 2


def test_drop_last_does_not_lose_examples():
    drawn = take(stream(DataLoader(Indices(10), 4, drop_last=True)), 5)
    assert set(joined(drawn)) == set(range(10))


def test_an_iterable_dataset_starts_over():
    loader = DataLoader(Forever(), batch_size=2)
    assert take(stream(loader), 5) == [[0, 1], [2, 3], [4], [0, 1], [2, 3]]
    resumed = stream(loader)
    resumed.skip_to(4)
    assert take(resumed, 2) == [[2, 3], [4]]


def test_a_plain_list_of_batches_starts_over():
    batches = [torch.tensor([1]), torch.tensor([2, 3])]
    assert take(stream(batches), 3) == [[1], [2, 3], [1]]
    resumed = stream(batches)
    resumed.skip_to(3)
    assert take(resumed, 1) == [[2, 3]]


def test_the_collation_is_the_users():
    loader = DataLoader(Indices(), 4, collate_fn=lambda items: torch.tensor(sorted(items)) * 100)
    (batch,) = take(stream(loader), 1)
    assert batch == sorted(batch)
    assert all(value % 100 == 0 for value in batch)


# ----------------------------------------------------------------------------------- what is spared


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_training_draws_the_same_random_numbers(workers, shuffle):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = state()
    drawing = stream(DataLoader(Augmented(), 4, shuffle=shuffle, num_workers=workers))
    drawing.peek()
    take(drawing, 5)
    drawing.skip_to(2)
    take(drawing, 1)
    assert state() == before


def test_the_generator_of_the_users_loader_is_not_drawn_from():
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(Indices(), 4, shuffle=True, generator=generator)
    before = generator.get_state()
    take(stream(loader), 4)
    assert torch.equal(generator.get_state(), before)


def test_the_users_loader_is_never_iterated():
    """A second iterator over persistent workers would reset the validation loop's."""

    class Untouchable(DataLoader):
        def __iter__(self):
            assert self is not users
            return super().__iter__()

    users = Untouchable(Indices(), 4)
    assert take(stream(users), 3) == take(stream(), 3)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(torch.zeros(0)), batch_size=2),
        DataLoader(Indices(), 2, sampler=SubsetRandomSampler([])),
        DataLoader(Indices(), batch_sampler=[]),
        [],
    ],
    ids=["dataset", "sampler", "batch-sampler", "list"],
)
def test_no_data_at_all(loader):
    with pytest.raises(MisconfigurationException, match=r"T2 data .*pass a dataloader"):
        stream(loader).next()


# ------------------------------------------------------------------------------------------ sources


def marked(value):
    """Held-out data that can be told apart, all in one batch."""
    x, y = VALID
    return DataLoader(TensorDataset(torch.full_like(x, value), y), batch_size=len(x))


class Source(Mlp):
    """Writes down which held-out data a hypergradient is made of."""

    def __init__(self, own=None):
        super().__init__()
        self.drawn = Recorder(values=set())
        if own is not None:
            self.hpo_dataloader = lambda: marked(own)

    def validation_step(self, batch, batch_idx):
        if "log" in vars(self):  # muted: not the validation loop
            self.drawn.values.add(batch[0][0, 0].item())
        return self.loss(batch)


class Data(pl.LightningDataModule):
    def __init__(self, own=None):
        super().__init__()
        if own is not None:
            self.hpo_dataloader = lambda: marked(own)

    def train_dataloader(self):
        return train_loader()

    def val_dataloader(self):
        return marked(4.0)


def drawn_from(model, callback, datamodule=None, **options):
    trainer = make_trainer(callbacks=callback, **options)
    trainer.fit(model, datamodule=datamodule or Data())
    assert len(callback.history) == 10
    (value,) = model.drawn.values
    return value


@pytest.mark.parametrize(
    ("argument", "module", "datamodule", "expected"),
    [(1.0, 2.0, 3.0, 1.0), (None, 2.0, 3.0, 2.0), (None, None, 3.0, 3.0), (None, None, None, 4.0)],
    ids=["argument", "module", "datamodule", "validation"],
)
def test_where_held_out_data_come_from(argument, module, datamodule, expected):
    callback = OnlineHPOCallback(
        T1T2(), optimizer=frozen, dataloader=None if argument is None else marked(argument)
    )
    assert drawn_from(Source(module), callback, Data(datamodule)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0},
        {"num_sanity_val_steps": 2},
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
    ],
    ids=["seldom", "sanity", "never", "interval"],
)
def test_the_validation_data_are_found_whenever_validation_happens(options):
    callback = OnlineHPOCallback(T1T2(), optimizer=frozen)
    assert drawn_from(Source(), callback, **options) == 4.0


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_several_validation_loaders(index):
    class Several(Source):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            assert dataloader_idx in (0, 1)
            if "log" in vars(self):
                assert dataloader_idx == index
            return super().validation_step(batch, batch_idx)

    model = Several()
    callback = OnlineHPOCallback(T1T2(), optimizer=frozen, dataloader_idx=index)
    fit(model, callback, valid=[marked(5.0), marked(6.0)])
    assert model.drawn.values == {5.0 + index}


def test_the_users_transfer_hooks_see_a_validation_batch():
    """Hooks that augment only while training must not augment held-out data."""
    stages = Recorder(values=set())

    class Hooked(Mlp):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training:
                stages.values.add("training")
                return batch
            stages.values.add("validating")
            return [batch[0] + 1, batch[1]]

    shifted = DataLoader(TensorDataset(VALID[0] + 1, VALID[1]), batch_size=len(VALID[0]))
    plain = observe(T1T2(), Mlp(), valid=shifted)
    hooked = observe(T1T2(), Hooked(), limit_val_batches=0)
    assert stages.values == {"training", "validating"}
    torch.testing.assert_close(
        hooked.history[-1].hypergradients, plain.history[-1].hypergradients, rtol=1e-9, atol=0
    )


def test_held_out_batches_follow_the_seed_of_the_callback():
    def run(seed):
        callback = observe(
            T1T2(), Mlp(), dataloader=DataLoader(TensorDataset(*VALID), 5), seed=seed
        )
        return torch.stack([torch.stack(list(r.hypergradients.values())) for r in callback.history])

    pl.seed_everything(1)
    first = run(0)
    pl.seed_everything(2)
    assert torch.equal(run(0), first)
    assert not torch.equal(run(1), first)
