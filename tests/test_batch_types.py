"""Batches of other types than containers of tensors, to which a step writes."""

import copy
from collections import UserDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from cases import BATCH, TRAIN, Mlp, fit, flat, frozen
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


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_copies_have_tensors_of_their_own(kind):
    x, y = torch.zeros(3), torch.ones(3)
    batch = kind(x, y)
    copied = copy_batch(batch)
    assert type(copied) is type(batch)
    own, _ = read(copied)
    own += 1.0
    assert torch.equal(x, torch.zeros(3))


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
