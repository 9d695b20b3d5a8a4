"""Batches of other types than containers of tensors, to which a step writes."""

import array
import copy
from collections import UserDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import BATCH, TRAIN, Mlp, fit, flat, frozen, train_loader, valid_loader, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK
from lightning_hpo.batch_copy import copy_batch


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor

    def to(self, device, **options):  # Lightning moves no frozen one by itself
        return self


@dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    y: torch.Tensor


Named = namedtuple("Named", "x y")


class Graph:
    """As graph batches are: it offers ``clone()``, and Lightning asks for ``to()``."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device, **options):
        return self

    def clone(self):
        return Graph(self.x.clone(), self.y.clone())


class Shallow(Graph):
    """Its ``clone()`` has the same tensors."""

    def clone(self):
        return copy.copy(self)


class SharedMeta(Graph):
    """Its ``clone()`` has the same dictionary, in which the step counts."""

    def __init__(self, x, y, meta=None):
        super().__init__(x, y)
        self.meta = {"n": 0} if meta is None else meta

    def clone(self):
        return SharedMeta(self.x.clone(), self.y.clone(), self.meta)


class ItsOwnDict(dict):
    """Its entries are its attributes."""

    def __init__(self, *args, **entries):
        super().__init__(*args, **entries)
        self.__dict__ = self


class Own(Mapping):
    """A mapping with a constructor of its own."""

    def __init__(self, x, y):
        self._held = {"x": x, "y": y}

    def __getitem__(self, key):
        return self._held[key]

    def __iter__(self):
        return iter(self._held)

    def __len__(self):
        return len(self._held)

    def to(self, device, **options):
        return self


class Encoding(UserDict):
    """As tokenizers return: data, and attributes beside them."""

    def __init__(self, x, y):
        super().__init__({"x": x, "y": y})
        self.offset = torch.zeros(())

    def to(self, device, **options):
        return self


KINDS = {
    "frozen": Frozen,
    "slots": Slotted,
    "named": Named,
    "graph": Graph,
    "shallow": Shallow,
    "mapping": Own,
    "encoding": Encoding,
    "meta": SharedMeta,
    "own dict": lambda x, y: ItsOwnDict(x=x, y=y),
    "nested": lambda x, y: [{"part": (Graph(x, y),)}],
}


def read(batch):
    while isinstance(batch, (list, dict, tuple)) and not hasattr(batch, "x"):
        batch = batch["part"] if isinstance(batch, dict) else batch[0]
    return (batch["x"], batch["y"]) if isinstance(batch, Mapping) else (batch.x, batch.y)


class Writing(Mlp):
    """Counts on the batch: a second pass over the same object would see other numbers."""

    def training_step(self, batch, batch_idx):
        x, y = read(batch)
        x += 1.0
        if isinstance(batch, SharedMeta):
            batch.meta["n"] += 1
            return self.loss((x - batch.meta["n"], y))
        if isinstance(batch, Encoding):
            batch.offset += 1.0
            return self.loss((x - batch.offset, y))
        return self.loss((x - 1.0, y))


def loader(kind):
    def collate(items):
        x, y = default_collate(items)
        return kind(x.clone(), y)

    return DataLoader(TensorDataset(*TRAIN), batch_size=BATCH, collate_fn=collate)


@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(2, "reverse")])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_step_may_write_to_its_batch(kind, make):
    runs = []
    for model, train in ((Mlp(), None), (Writing(), loader(kind))):
        callback = OnlineHPOCallback(make(), optimizer=frozen)
        fit(model, callback, steps=6, train=train)
        runs.append((flat(model.parameters()), callback.history))
    (expected, history), (found, written) = runs
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(written, history, strict=True):
        torch.testing.assert_close(a.hypergradients, b.hypergradients, rtol=1e-9, atol=1e-12)


class Sequences(Mlp):
    """Gets the rows of a batch as sequences of different lengths."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss((torch.nested.to_padded_tensor(x, 0.0), y))


@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(2, "reverse")])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:.*prototype stage")
def test_nested_tensors(layout, make):
    def collate(items):
        rows, y = zip(*items, strict=True)
        rows = [row[: 2 + i % 3] for i, row in enumerate(rows)] + [torch.ones_like(rows[0])]
        return torch.nested.nested_tensor(rows, layout=layout), torch.tensor([*map(int, y), 0])

    train = DataLoader(TensorDataset(*TRAIN), batch_size=BATCH, collate_fn=collate)
    found = []
    for callbacks in ([], [OnlineHPOCallback(make(), optimizer=frozen)]):
        model = Sequences()
        fit(model, callbacks, steps=6, train=train)
        found.append(flat(model.parameters()))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_copies_have_tensors_of_their_own(kind):
    x, y = torch.zeros(3), torch.ones(3)
    batch = kind(x, y)
    copied = copy_batch(batch)
    assert type(copied) is type(batch)
    own, _ = read(copied)
    own += 1.0
    assert torch.equal(x, torch.zeros(3))


def test_arrays_of_objects_and_other_memory():
    objects = np.empty(2, dtype=object)
    objects[0], objects[1] = torch.zeros(2), [0]
    batch = {"objects": objects, "numbers": array.array("d", [0.0]), "bytes": bytearray(1)}
    copied = copy_batch(batch)
    copied["objects"][0] += 1.0
    copied["objects"][1][0] += 1
    copied["numbers"][0] += 1.0
    copied["bytes"][0] += 1
    assert torch.equal(objects[0], torch.zeros(2))
    assert (objects[1], batch["numbers"][0], batch["bytes"][0]) == ([0], 0.0, 0)


class Own3(torch.Tensor):
    pass


def test_attributes_and_classes_of_tensors():
    whole = torch.arange(8.0).as_subclass(Own3)
    first, second = whole[:5], whole[3:]
    first.scale, first.index = 1.5, torch.zeros(1)
    a, b = copy_batch([first, second])
    assert type(a) is type(b) is Own3
    assert (a.scale, a.index) == (1.5, first.index)
    assert a.index is not first.index
    a[4] = 100.0
    assert (float(b[1]), float(whole[4])) == (100.0, 4.0)


@pytest.mark.parametrize("shift", [0, 100, 999])
def test_slices_of_a_large_memory(shift):
    """Only what they cover is copied, and what overlaps still does."""
    whole = torch.arange(1_000_000.0).reshape(1000, 1000)
    batch = whole[:2, :400], whole[:2, 300:], whole[shift], whole[0, :0]
    copied = copy_batch(batch)
    for a, b in zip(copied, batch, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.untyped_storage().nbytes() < 20_000
    copied[0].mul_(2.0)
    assert float(copied[1][1, 50]) == 2 * 1350.0
    assert torch.equal(whole, torch.arange(1_000_000.0).reshape(1000, 1000))


def once(examples):
    return (torch.stack(part) for part in zip(*examples, strict=True))


class Reads(Mlp):
    """Takes whatever may be iterated."""

    def training_step(self, batch, batch_idx):
        return self.loss(list(batch))

    validation_step = training_step


@pytest.mark.parametrize("make", [T1T2, ClipR])
@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_generator_is_refused_with_a_remedy_that_works(part, make):
    def trained(collate):
        model = Reads()
        loader = {"train": train_loader, "valid": valid_loader}[part](collate_fn=collate)
        fit(model, OnlineHPOCallback(make(), optimizer=frozen), **{part: loader})
        return model

    before = weights(Reads())
    with pytest.raises(
        MisconfigurationException, match=r"a generator.*a list or a tuple"
    ) as caught:
        trained(once)
    assert "clone" not in str(caught.value)
    assert not torch.equal(weights(trained(lambda examples: list(once(examples)))), before)


def test_iterators_over_what_is_in_memory_are_copied():
    batch = map(torch.neg, [torch.ones(1), torch.zeros(1)])
    assert [float(x) for x in copy_batch(batch)] == [-1.0, 0.0]
    assert [float(x) for x in batch] == [-1.0, 0.0]


def test_what_cannot_be_copied_is_refused_by_name():
    class Stubborn:
        __slots__ = ("__weakref__", "x")

        def __init__(self):
            self.x = torch.zeros(2)

        def clone(self):
            return self

        def __reduce_ex__(self, protocol):
            raise TypeError("no")

    with pytest.raises(MisconfigurationException, match="Stubborn"):
        copy_batch([Stubborn()])
