"""What replays leave behind where nothing can put it back is found at the start, and named."""

import csv
import enum
import importlib
import io
import itertools
import math
import mmap
import queue
import random
import sys
import tempfile
import threading
import warnings
import weakref
from contextlib import ExitStack
from types import SimpleNamespace

import drawing
import numpy as np
import pytest
import torch
from cases import (
    TRAIN,
    Mlp,
    fit,
    flat,
    frozen,
    last_hypergradient,
    observe,
    relative_error,
    train_loader,
    truth,
    valid_loader,
    weights,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK, contents
from lightning_hpo.step.trace_check import sum_of_bits

ESTIMATORS = {"T1T2": T1T2, "ClipR": ClipR, "reverse": lambda: UnrollK(2, "reverse")}
EVERY_ESTIMATOR = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)


class Leaving(Mlp):
    """Changes something in each step."""

    after = 0  # the first step in which that happens

    def __init__(self, *args, **options):
        super().__init__("momentum", *args, **options)
        self.kept = self.make()

    def make(self):
        return None

    def change(self, batch, loss):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step >= self.after:
            self.change(batch, loss)
        return loss


class Bytes(Leaving):
    """A C object, into which no walk sees."""

    def make(self):
        return {"log": mmap.mmap(-1, 1000)}

    def change(self, batch, loss):
        self.kept["log"][self.kept["log"].find(b"\0")] = 120


class LargeArray(Leaving):
    """Too large to be copied even once."""

    def make(self):
        return {"log": np.zeros(1_000_001)}

    def change(self, batch, loss):
        self.kept["log"][1_000_000] += 1.0


class LargeTensor(Leaving):
    """Likewise, and written to in a way that torch does not count."""

    def make(self):
        return {"log": torch.zeros(1_000_001)}

    def change(self, batch, loss):
        self.kept["log"].data[-1] += 1.0


class Computed(Leaving):
    """Has a graph, so that it is taken for a result; its order changes, its sum does not."""

    def make(self):
        return {"log": torch.arange(101.0, requires_grad=True) * 1.0}

    def change(self, batch, loss):
        self.kept["log"].data.copy_(self.kept["log"].detach().roll(1))


class Late(Leaving):
    """Something that still runs when the replay is over."""

    def make(self):
        return {"log": []}

    def change(self, batch, loss):
        weakref.finalize(loss, self.kept["log"].append, 1)


MODULES = {kind.__name__: kind for kind in (Bytes, LargeArray, LargeTensor, Late)}


@EVERY_ESTIMATOR
@pytest.mark.parametrize("name", [*MODULES, "Computed"])
def test_what_the_module_holds(name, make, monkeypatch):
    monkeypatch.setattr(contents, "_LOOKED_AT", 1_000_000)
    model = {**MODULES, "Computed": Computed}[name]()
    before = weights(model)
    found = r"what the module holds: \"kept\['log'\]\"\. Keep"
    with pytest.raises(MisconfigurationException, match=found):
        observe(make(), model)
    assert torch.equal(weights(model), before)


class Nameless(Leaving):
    """In a set, where it has no place of its own."""

    def make(self):
        return {np.random.PCG64(0)}

    def change(self, batch, loss):
        next(iter(self.kept)).advance(1)


def test_what_has_no_name():
    with pytest.raises(MisconfigurationException, match=r"what the module holds: 'a PCG64'"):
        observe(ClipR(), Nameless())


class Numbers(Leaving):
    def make(self):
        return [queue.SimpleQueue()]

    def change(self, batch, loss):
        self.kept[0].put(1.0)


class OwnQueue(queue.Queue):
    """One of a class of the user's own."""


class More(Numbers):
    def make(self):
        return [OwnQueue()]


class Text(Leaving):
    def make(self):
        return [io.StringIO()]

    def change(self, batch, loss):
        self.kept[0].write("a step\n")


class Table(Leaving):
    """By way of a writer of rows, which has the file for itself."""

    def make(self):
        file = tempfile.TemporaryFile("w")  # noqa: SIM115
        return [file.file if hasattr(file, "file") else file, csv.writer(file)]

    def change(self, batch, loss):
        self.kept[1].writerow([loss.item()])


class Summary(Leaving):
    """Its events are written by a thread."""

    def make(self):
        return [SummaryWriter(tempfile.mkdtemp())]

    def change(self, batch, loss):
        self.kept[0].add_scalar("loss", loss.item(), self.global_step)

    def on_train_end(self):
        self.kept[0].close()


@EVERY_ESTIMATOR
@pytest.mark.parametrize("kind", [Numbers, More, Text, Table, Summary])
def test_files_and_queues_are_named_and_left(kind, make):
    plain = kind()
    fit(plain)
    model = kind()
    with pytest.warns(
        UserWarning, match=r"write, as the.*to 'kept\[0\]'; files.*Write to"
    ) as caught:
        observe(make(), model)
    assert sum("files and queues" in str(w.message) for w in caught) == 1
    assert torch.equal(weights(model), weights(plain))


class Lines(Dataset):
    """Goes on in a file with each example."""

    def __init__(self, file, n):
        self.file, self.n = file, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return TRAIN[0][i] + float(self.file.readline()), TRAIN[1][i]


class ReadsInStep(Leaving):
    def make(self):
        return [io.BufferedReader(io.BytesIO(b"0.5\n" * 500))]

    def change(self, batch, loss):
        self.kept[0].readline()


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{i / 100}\n" for i in range(2000)))
    with ExitStack() as stack:
        yield lambda: stack.enter_context(path.open())


@EVERY_ESTIMATOR
def test_a_file_that_is_read_for_both_is_named_with_a_remedy_that_works(make, lines):
    def trained(held_out=None, callback=None, **options):
        model = Mlp("momentum")
        train = DataLoader(Lines(lines(), 40), batch_size=8)
        file = train.dataset.file if held_out is None else held_out
        valid = DataLoader(Lines(file, 20), batch_size=20)
        fit(model, callback, train=train, valid=valid, check_val_every_n_epoch=100, **options)
        return weights(model)

    plain = trained()
    with pytest.warns(UserWarning, match=r"read on in open files.*'\S*dataset.file'") as caught:
        assert not torch.equal(trained(None, OnlineHPOCallback(make(), optimizer=frozen)), plain)
    assert not any("Write" in str(w.message) for w in caught)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*open files")
        assert torch.equal(trained(lines(), OnlineHPOCallback(make(), optimizer=frozen)), plain)


@EVERY_ESTIMATOR
def test_a_file_that_steps_read_is_named(make):
    text = r"read on in open files.*'kept\[0\]'.*on_train_batch_start"
    with pytest.warns(UserWarning, match=text):
        observe(make(), ReadsInStep())


PUT = []


class Worker:
    """Has a thread of its own, which takes from a queue and appends to a list."""

    def __init__(self):
        self.queue, self.got = queue.Queue(), []
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while (item := self.queue.get()) is not None:
            self.got.append(item)
            self.queue.task_done()


class Working(Leaving):
    def make(self):
        return Worker()

    def change(self, batch, loss):
        PUT.append(self.global_step)
        self.kept.queue.put(self.global_step)
        self.kept.queue.join()

    def on_train_end(self):
        self.kept.queue.put(None)
        self.kept.thread.join()


@EVERY_ESTIMATOR
def test_what_a_thread_works_on_is_left_to_it(make):
    """What it has been given is not taken from it."""
    PUT.clear()
    model = Working()
    observe(make(), model)
    assert model.kept.got == PUT


class Gone:
    pass


PROXY = weakref.proxy(Gone())


class Proxies(Leaving):
    """Weak proxies whose object goes in the first step."""

    def make(self):
        gone = Gone()
        self.proxy = weakref.proxy(gone)
        return [gone, {"proxy": weakref.proxy(gone)}, weakref.proxy(gone)]

    def change(self, batch, loss):
        self.kept[0] = None
        assert PROXY is not self.proxy


@EVERY_ESTIMATOR
@pytest.mark.parametrize("where", ["module", "data"])
def test_weak_proxies_of_what_is_gone(where, make):
    plain = Proxies()
    fit(plain)
    model = Proxies()
    loader = train_loader()
    if where == "data":
        loader.dataset.proxy = weakref.proxy(Gone())
    observe(make(), model, train=loader)
    assert torch.equal(weights(model), weights(plain))


BATCHES = []


class OtherBatch(Leaving):
    """Writes to the batch itself, which it has kept where no walk comes by."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            BATCHES[:] = batch
        return batch

    def change(self, batch, loss):
        BATCHES[0].data.mul_(0.5)


@EVERY_ESTIMATOR
def test_the_batch_of_the_training(make):
    with pytest.raises(MisconfigurationException, match=r"the training gets: '\[0\]'. Let steps"):
        observe(make(), OtherBatch())


class OwnMomentum(Leaving):
    """Writes into the state of the optimizer, as some warm restarts do."""

    def change(self, batch, loss):
        state = self.trainer.optimizers[0].state
        if self.after:
            state[self.net[0].weight]["momentum_buffer"].mul_(0.5)
        else:
            state[self.net[0].weight]["momentum_buffer"] = torch.ones(5, 4)


@EVERY_ESTIMATOR
def test_the_state_of_the_optimizer(make):
    text = r"the optimizer's state: \"\['net\.0\.weight'\]\". Change it in"
    with pytest.raises(MisconfigurationException, match=text):
        observe(make(), OwnMomentum())


class Later(OwnMomentum):
    after = 1


@EVERY_ESTIMATOR
def test_looking_for_the_state_of_a_parameter_is_no_change(make, recwarn):
    class Model(Mlp):
        def training_step(self, batch, batch_idx):
            momentum = self.trainer.optimizers[0].state[self.net[0].weight].get("momentum_buffer")
            size = 0.0 if momentum is None else momentum.square().mean()
            return super().training_step(batch, batch_idx) * (1 + size)

    found = []
    for callbacks in ([], [OnlineHPOCallback(make(), optimizer=frozen)]):
        model = Model()
        fit(model, callbacks)
        found.append(weights(model))
    assert torch.equal(*found)
    assert not [w for w in recwarn if "optimizer's state" in str(w.message)]


def test_what_comes_in_the_second_step_is_warned_about():
    """θ has moved: too late for an error."""
    text = r"the optimizer's state: \"\['net\.0\.weight'\]\['momentum_buffer'\]\". Change it in"
    with pytest.warns(UserWarning, match=text) as caught:
        observe(ClipR(), Later())
    assert sum("cannot be put back" in str(w.message) for w in caught) == 1


class MuchLater(Bytes):
    after = 50


def test_what_comes_later_is_warned_about():
    with pytest.warns(UserWarning, match=r"what the module holds: \"kept\['log'\]\""):
        observe(ClipR(), MuchLater(), steps=104, max_epochs=-1)


class Scheduling(Leaving):
    def change(self, batch, loss):
        self.lr_schedulers().step()


class SchedulingInSequence(Scheduling):
    """What the outer one holds is not put back."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        parts = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]
        whole = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [3])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": whole, "interval": "step"}}


def test_learning_rate_schedulers():
    with pytest.raises(MisconfigurationException, match=r"schedulers: '\[0\]\.\w+.*Step them"):
        observe(ClipR(), SchedulingInSequence())


@EVERY_ESTIMATOR
def test_a_plain_scheduler_is_put_back(make):
    plain = Scheduling()
    fit(plain)
    model = Scheduling()
    observe(make(), model)
    assert torch.equal(weights(model), weights(plain))
    found = last_hypergradient(observe(ClipR(math.inf), Scheduling(granularity="model")))
    assert relative_error(found, truth(lambda: Scheduling(granularity="model"))) < 1e-5


class Doubling(Leaving):
    """Changes a gradient when the replay is over."""

    def change(self, batch, loss):
        weight = self.trainer.optimizers[0].param_groups[0]["params"][0]

        def double(weight=weight):
            if weight.grad is not None:
                weight.grad.mul_(2.0)

        weakref.finalize(loss, double)


def test_gradients_that_accumulate():
    """Where there are any: from the second micro-batch on."""
    with pytest.raises(MisconfigurationException, match=r"gradients.*net\.0\.weight.*Change them"):
        observe(
            ClipR(), Doubling(inside_loss=True), accumulate_grad_batches=2, limit_train_batches=4
        )


class Drawing(Leaving):
    """Draws when the loss is let go of: within the step, for the training, but after a replay."""

    draw = staticmethod(torch.rand)
    arguments = (1,)

    def change(self, batch, loss):
        weakref.finalize(loss, self.draw, *self.arguments)


GENERATORS = {
    "torch on the CPU": (torch.rand, (1,)),
    "numpy": (np.random.rand, ()),
    "python": (random.random, ()),
}


@EVERY_ESTIMATOR
@pytest.mark.parametrize("name", GENERATORS)
def test_random_states(name, make):
    draw, arguments = GENERATORS[name]
    kind = type("Kind", (Drawing,), {"draw": staticmethod(draw), "arguments": arguments})
    text = f"random states: that of {name}. Draw within the step"
    with pytest.raises(MisconfigurationException, match=text):
        observe(make(), kind())


class Noisy:
    """A batch whose copies draw random numbers."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device, **options):
        return self

    def clone(self):
        return Noisy(self.x + 0.0 * torch.rand(()), self.y.clone())


class OfObjects(Mlp):
    def training_step(self, batch, batch_idx):
        return self.loss((batch.x, batch.y))


def loader_of(kind):
    return DataLoader(
        TensorDataset(*next(iter(train_loader()))),
        batch_size=4,
        collate_fn=lambda items: kind(*map(torch.stack, zip(*items, strict=True))),
    )


def test_copies_of_batches_that_draw():
    with pytest.raises(MisconfigurationException, match=r"torch on the CPU.*clone\(\)"):
        observe(UnrollK(2, "reverse"), OfObjects(), train=loader_of(Noisy))


class Counted(Noisy):
    """A batch whose copies count in the class."""

    copies = 0

    def clone(self):
        Counted.copies += 1
        return Counted(self.x.clone(), self.y.clone())


def test_copies_of_batches_that_change_their_class():
    with pytest.raises(MisconfigurationException, match=r"the training gets: 'copies'. Let steps"):
        observe(UnrollK(2, "reverse"), OfObjects(), train=loader_of(Counted))


INSTALLED = """
class Lazy:
    chosen = {}

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device, **options):
        return self

    def clone(self):
        def clone(self):
            return Lazy(self.x.clone(), self.y.clone())

        Lazy.clone, Lazy.chosen["clone"] = clone, clone
        return self.clone()
"""


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_an_installed_class_may_choose_a_method_at_its_first_call(folder, tmp_path, monkeypatch):
    """TensorDict does so by the version of torch; nothing of the training depends on it."""
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "lazy_batches.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(tmp_path / folder)
    monkeypatch.delitem(sys.modules, "lazy_batches", raising=False)
    kind = importlib.import_module("lazy_batches").Lazy
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be put back.*")
        observe(UnrollK(2, "reverse"), OfObjects(), train=loader_of(kind))
    assert kind.chosen  # it was copied


class Validating(Bytes):
    """Leaves something at held-out batches alone."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.change(batch, None)
        return self.loss(batch)


@EVERY_ESTIMATOR
def test_held_out_batches(make):
    with pytest.raises(MisconfigurationException, match=r"what the module holds: \"kept\['log'\]"):
        observe(make(), Validating())


# ------------------------------------------------------------------------------------------ silence


class Quiet(Leaving):
    """Changes much that is put back, its batch too, and reads what others change."""

    def loss(self, batch):
        return super().loss([batch[0], batch[1].clone()])

    def make(self):
        return {
            "log": [],
            "bytes": bytearray(b"abc"),
            "text": io.StringIO("abc"),
            "large": np.zeros(1_000_001),
            "tensor": torch.zeros(3),
            "vocabulary": {f"w{i}": i for i in range(2000)},
            "generator": np.random.default_rng(1),
        }

    def change(self, batch, loss):
        self.kept["log"].append(loss.item())
        self.kept["tensor"] += self.kept["generator"].random() + random.random()
        assert self.kept["bytes"][0] == 97
        assert self.kept["large"].sum() == 0
        batch[1].add_(1)


@EVERY_ESTIMATOR
@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_nothing_is_said_without_a_reason(make, derivatives, accumulated):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be put back.*")
        callback = OnlineHPOCallback(
            make(), optimizer=frozen, every_n_steps=2, derivatives=derivatives
        )
        fit(
            Quiet(),
            callback,
            steps=104,
            max_epochs=-1,
            train=train_loader(),
            accumulate_grad_batches=accumulated,
            limit_val_batches=0,
            valid=valid_loader(),
        )
    assert flat(callback.history[-1].hypergradients.values()).isfinite().all()


def test_it_looks_at_few_steps(monkeypatch):
    """And at a later one at which λ is updated, where the host waits for the device anyway."""
    from lightning_hpo.step import trace_check

    looked = []

    class Look(trace_check._Look):
        def __init__(self, trainer, module, batch):
            looked.append(trainer.global_step + 1)
            super().__init__(trainer, module, batch)

    monkeypatch.setattr(trace_check, "_Look", Look)
    observe(ClipR(), Mlp(), steps=230, max_epochs=-1, every_n_steps=5)
    # The batch and the step; at updates, the step has been made.
    assert looked == [1, 1, 2, 2, 6, 11, 105, 105, 111]


# --------------------------------------------------------------------------- outside of the module

COUNT = 0
SEEN = []
CACHE = {}
TENSOR = torch.zeros(2)
SETTINGS = SimpleNamespace(scale=1.0, calls=0)
VOCABULARY = {"a": 1}


def note(x):
    SEEN.append(x)


class Global(Leaving):
    def change(self, batch, loss):
        global COUNT
        COUNT += VOCABULARY["a"]


class Named(Leaving):
    """By way of a function."""

    def change(self, batch, loss):
        note(loss.item())


class Cached(Leaving):
    def change(self, batch, loss):
        CACHE[len(CACHE)] = SETTINGS.scale


class InPlace(Leaving):
    def change(self, batch, loss):
        TENSOR.add_(1.0)


class Attribute(Leaving):
    def change(self, batch, loss):
        SETTINGS.calls += 1


class Settings:
    calls = 0
    nested = SimpleNamespace(inner={"calls": 0})

    @staticmethod
    def call():
        Settings.calls += 1

    @classmethod
    def call_too(cls):
        cls.calls += 1


class Slots:
    __slots__ = ("calls",)


class Mode(enum.Enum):
    FIRST = 1


class Size(int):
    calls = 0


class Own:
    def __init__(self):
        self.calls = [0]

    def call(self):
        HIDDEN["calls"] += 1


SLOTS = Slots()
SLOTS.calls = 0
OWN = Own()
HIDDEN = {"calls": 0}
COMPILED = type("Compiled", (), {"__module__": "numpy.compiled"})()
COMPILED.cache = {}
COUNTER = [itertools.count()]
TENSORS = {"a": (torch.zeros(2),)}
TEACHER = torch.nn.Linear(2, 2).requires_grad_(False)


def counts():
    counts.calls = getattr(counts, "calls", 0) + 1


def on_own(name):
    """Of a kind that replays leave as it is, held by the module."""

    def change(self, batch, loss):
        self.kept.calls = getattr(self.kept, "calls", 0) + 1

    kept = {"class": Settings, "module": drawing, "member": Mode.FIRST, "number": Size(3)}[name]
    return type("OnOwn", (Leaving,), {"make": lambda self: kept, "change": change})


def doing(act):
    return type("Doing", (Leaving,), {"change": lambda self, batch, loss: act()})


DEEPER = {
    "Settings.calls": doing(lambda: setattr(Settings, "calls", Settings.calls + 1)),
    "Settings.calls ": doing(lambda: Settings.call()),
    "Settings.calls  ": doing(lambda: Settings.call_too()),
    "Settings.nested": doing(lambda: Settings.nested.inner.update(calls=object())),
    "SLOTS": doing(lambda: setattr(SLOTS, "calls", SLOTS.calls + 1)),
    "OWN": doing(lambda: OWN.calls.append(1)),
    "HIDDEN": doing(lambda: OWN.call()),
    "COUNTER": doing(lambda: next(COUNTER[0])),
    "TENSORS": doing(lambda: TENSORS["a"][0].add_(1.0)),
    "TEACHER": doing(lambda: TEACHER.weight.add_(1.0)),
    "counts": doing(lambda: counts()),
    "RNG": doing(lambda: drawing.draw()),
    "drawing.COUNT": doing(lambda: setattr(drawing, "COUNT", drawing.COUNT + 1)),
    "kept.calls": on_own("class"),
    "kept.calls ": on_own("module"),
    "kept": on_own("member"),
    "kept ": on_own("number"),
}


@pytest.mark.parametrize("name", DEEPER)
def test_variables_of_other_kinds(name):
    text = rf"outside of the module, and do not put them back: '{name.strip()}'\. If.*as attrib"
    with pytest.warns(UserWarning, match=text) as caught:
        observe(ClipR(), DEEPER[name]())
    assert sum("outside of the module" in str(w.message) for w in caught) == 1


def closing():
    seen = []

    class Closing(Leaving):
        def change(self, batch, loss):
            seen.append(loss.item())

    return Closing()


OUTSIDE = {
    "COUNT": Global,
    "SEEN": Named,
    "CACHE": Cached,
    "TENSOR": InPlace,
    "SETTINGS": Attribute,
    "seen": closing,
}


@EVERY_ESTIMATOR
@pytest.mark.parametrize("name", OUTSIDE)
def test_variables_outside_of_the_module(name, make):
    text = rf"outside of the module, and do not put them back: '{name}'\. If.*as attributes"
    with pytest.warns(UserWarning, match=text) as caught:
        observe(make(), OUTSIDE[name]())
    assert sum("outside of the module" in str(w.message) for w in caught) == 1


class SummarizesLater(Summary):
    """Not in the step itself."""

    def change(self, batch, loss):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().change(batch, outputs["loss"])


@EVERY_ESTIMATOR
def test_files_that_steps_leave_alone(make):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*files and queues")
        observe(make(), SummarizesLater())


class Reading(Leaving):
    """Reads them alone; one of a library keeps what it has compiled."""

    def make(self):
        return [Settings, drawing, Mode.FIRST]

    def change(self, batch, loss):
        COMPILED.cache[len(COMPILED.cache)] = loss
        assert Settings.calls + SLOTS.calls + len(OWN.calls) + drawing.COUNT >= 0
        assert TEACHER(TENSORS["a"][0]).isfinite().all()
        assert len(COUNTER) == 1
        assert COUNT + len(SEEN) + len(CACHE) >= 0
        assert float(TENSOR.sum()) + SETTINGS.scale + VOCABULARY["a"] >= 0
        self.log("loss", loss)


@EVERY_ESTIMATOR
def test_variables_that_are_read(make):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*outside of the module")
        observe(make(), Reading())


class Example:
    """Keeps what has been made of it."""

    def __init__(self, x, y):
        self.x, self.y, self.made = x, y, {}


class Examples(torch.utils.data.Dataset):
    """So many objects that they are not copied for the held-out batches."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.examples = [Example(torch.randn(4, generator=generator), i % 3) for i in range(1000)]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        example = self.examples[index]
        example.made.setdefault("x", 2 * example.x)
        return example.made["x"], example.y


@EVERY_ESTIMATOR
def test_examples_that_are_kept_are_named_and_no_reason_to_refuse(make):
    def train(callback):
        model = Mlp(granularity="model")
        loaders = [torch.utils.data.DataLoader(Examples(), 4) for _ in range(2)]
        fit(model, callback, train=loaders[0], valid=loaders[1])
        return weights(model)

    plain = train(None)
    with pytest.warns(UserWarning, match="examples are only kept for later") as caught:
        tuned = train(OnlineHPOCallback(make(), optimizer=frozen))
    assert torch.equal(plain, tuned)
    assert sum("what datasets hold" in str(w.message) for w in caught) == 1


SUMMED = {
    "scalar": torch.tensor(0.5),
    "empty": torch.empty(0),
    "rows": torch.randn(70, 64),
    "an odd size": torch.randn(1025, 3),
    "transposed": torch.randn(40, 90).t(),
    "a part of another, between long words": torch.randn(3001)[1:],
    "half": torch.randn(5001).half(),
    "bfloat16": torch.randn(5001).bfloat16(),
    "double": torch.randn(3000, dtype=torch.float64),
    "complex": torch.randn(2500, dtype=torch.complex64),
    "flags": torch.rand(4099) < 0.5,
}


@pytest.mark.parametrize("value", SUMMED.values(), ids=SUMMED)
def test_a_sum_of_bits_changes_with_any_element_and_any_exchange(value):
    before = sum_of_bits(value)
    assert before.dtype == torch.int64
    assert sum_of_bits(value.clone()) == before
    places = range(0, value.numel(), max(1, value.numel() // 40))
    for i in places:
        changed = value.clone().contiguous()
        flat = changed.view(-1)
        flat[i] = ~flat[i] if flat.dtype == torch.bool else -flat[i]
        assert sum_of_bits(changed) != before
    for i in (1, 2, 512, 1023, 1024, 2048):
        exchanged = value.clone().contiguous()
        flat = exchanged.view(-1)
        if len(flat) > i and flat[0] != flat[i]:
            flat[0], flat[i] = flat[i].clone(), flat[0].clone()
            assert sum_of_bits(exchanged) != before


@pytest.mark.parametrize(
    "value", [torch.eye(3).to_sparse(), torch.randn(3, device="meta")], ids=["sparse", "meta"]
)
def test_there_is_no_sum_of_bits_that_are_not_there(value):
    assert sum_of_bits(value) is None


class Whole(torch.Tensor):
    """Has no parts."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func not in (torch.Tensor.__getitem__, torch.Tensor.flatten)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_sum_of_bits_asks_nothing_of_subclasses():
    value = torch.randn(40, 90)
    assert sum_of_bits(value.as_subclass(Whole)) == sum_of_bits(value)
