"""What a step changes beyond the module's own tensors: shared objects, containers, iterators."""

import array
import collections
import contextvars
import copy
import ctypes
import dataclasses
import functools
import itertools
import math
import multiprocessing
import random
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    STEPS,
    Mlp,
    fit,
    frozen,
    last_hypergradient,
    observe,
    relative_error,
    truth,
    valid_loader,
    weights,
)
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK, shield
from lightning_hpo.contents import Walker

ESTIMATORS = {"T1T2": T1T2, "ClipR": ClipR, "reverse": lambda: UnrollK(4, "reverse")}


def assert_undisturbed(kind, make):
    """Weights, buffers and what ``kept`` says are those of the training without the callback."""
    observed, alone = kind(), kind()
    fit(observed, OnlineHPOCallback(make(), optimizer=frozen))
    fit(alone)
    assert torch.equal(weights(observed), weights(alone))
    for (name, a), (_, b) in zip(
        observed.state_dict().items(), alone.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    if hasattr(alone, "kept"):
        assert observed.kept() == alone.kept()


def assert_exact(kind):
    found = last_hypergradient(observe(ClipR(math.inf), kind()))
    assert relative_error(found, truth(kind)) < 1e-5


# ----------------------------------------------------------------------------------- shared objects


class Saver:
    def __init__(self, module):
        self.out = None
        module.register_forward_hook(self.hook)

    def hook(self, module, inputs, output):
        self.out = output


class BoundMethod(Mlp):
    is_exact = True

    def __init__(self):
        super().__init__("momentum")
        self.saver = Saver(self.net[1])

    def features(self):
        return [self.saver.out]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + 0.1 * sum(f.pow(2).mean() for f in self.features())


class Closure(BoundMethod):
    """The list is shared by a closure, and emptied at the start of each step."""

    def __init__(self):
        super().__init__()
        seen = self.seen = []
        self.net[1].register_forward_hook(lambda module, inputs, output: seen.append(output))

    def features(self):
        return self.seen

    def training_step(self, batch, batch_idx):
        self.seen.clear()
        return super().training_step(batch, batch_idx)


def store(where, key, module, inputs, output):
    where[key] = output


class Partial(BoundMethod):
    def __init__(self):
        super().__init__()
        self.seen = {}
        self.net[1].register_forward_hook(functools.partial(store, self.seen, "tanh"))

    def features(self):
        return list(self.seen.values())


class OwnClosure(BoundMethod):
    """Only the hook knows the count, and the tensor that it writes to in place.

    It acts in training alone, so that L_V is not that of ``truth``, which looks in that mode.
    """

    is_exact = False

    def __init__(self):
        super().__init__()
        count, scale = 0, torch.ones(())

        def hook(module, inputs, output):
            nonlocal count
            if not module.training:  # at the end of an epoch as well: no part of the truth
                return None
            count += 1
            scale.mul_(0.97)
            return output * scale / (1 + 0.01 * count)

        self.net[1].register_forward_hook(hook)


class SharedBuffer(BoundMethod):
    """A hook moves a buffer that the module reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        scale = self.scale
        self.net[1].register_forward_pre_hook(
            lambda module, inputs: scale.data.mul_(0.95) and None if module.training else None
        )

    def features(self):
        return [self.saver.out * self.scale]


SHARING = [BoundMethod, Closure, Partial, OwnClosure, SharedBuffer]


@pytest.mark.parametrize("kind", SHARING)
def test_what_hooks_share_with_the_module(kind):
    for make in ESTIMATORS.values():
        assert_undisturbed(kind, make)
    if kind.is_exact:
        assert_exact(kind)


def test_the_graph_of_a_replay_is_let_go_of():
    model = BoundMethod()
    fit(model, OnlineHPOCallback(ClipR(), optimizer=frozen), steps=3)
    # That of the training's own last call, and of no replay before the next one.
    assert model.saver.out.shape[0] in (8, 20)
    before = model.saver.out
    fit(model, OnlineHPOCallback(T1T2(), optimizer=frozen), steps=1, limit_val_batches=0)
    assert model.saver.out is not before


# -------------------------------------------------------------------------------------- containers


@dataclasses.dataclass(slots=True)
class Slotted:
    n: float = 1.0


class Meters(collections.UserDict):
    pass


class Log(list):
    """A list with an attribute."""


class OwnIterator:
    def __init__(self):
        self.position = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return 1 / self.position


class Adding:
    def __init__(self):
        self.total = 0.0

    def __call__(self, *parts):
        self.total += 0.1
        return self.total + sum(parts)


def _mutate_metrics(kept, x):
    kept[0].update(x)
    kept[1]["all"]["mean"].update(x)
    return kept[0].compute() + kept[1]["all"]["mean"].compute()


def _mutate_log(kept, x):
    kept.append(x)
    kept.total = getattr(kept, "total", 0.0) + 1
    return len(kept) + kept.total


def _mutate_dict(kept, x):
    kept["n"] = kept.get("n", 0) + 1
    kept.setdefault("inner", collections.OrderedDict())[kept["n"]] = [x]
    return kept["n"]


def _mutate_slots(kept, x):
    kept.n += 1
    return kept.n


def _mutate_module(kept, x):
    kept[0](torch.full((2, 1), x))
    return kept[0].running_mean.mean()


STATE = {
    "hparams": (lambda: {"lr": 0.1}, _mutate_dict),
    "UserDict": (Meters, _mutate_dict),
    "OrderedDict": (collections.OrderedDict, _mutate_dict),
    "slots": (Slotted, _mutate_slots),
    "slots in a tuple": (lambda: (Slotted(),), lambda kept, x: _mutate_slots(kept[0], x)),
    "list with an attribute": (Log, _mutate_log),
    "metrics in containers": (
        lambda: [MeanMetric(), {"all": MetricCollection({"mean": MeanMetric()})}],
        _mutate_metrics,
    ),
    "module in a list": (lambda: [nn.BatchNorm1d(1)], _mutate_module),
    "own iterator": (OwnIterator, lambda kept, x: next(kept)),
    "iterator over a list": (
        lambda: iter([1.0 + 0.1 * i for i in range(20)]),
        lambda k, x: next(k),
    ),
    "cycle": (lambda: itertools.cycle([1.0, 2.0, 3.0]), lambda k, x: next(k)),
    "iterators that call": (
        lambda: [
            iter(random.Random(1).random, None),
            map(Adding(), itertools.count()),
            zip(iter(Adding(), None), itertools.count(), strict=False),
            itertools.accumulate(itertools.repeat(0.1), Adding()),
        ],
        lambda k, x: next(k[0]) + 0.1 * next(k[1]) + next(k[2])[0] + next(k[3]),
    ),
    "several cycles": (
        lambda: [itertools.cycle([1.0, 2.0, 3.0]), (itertools.cycle([1.0, 2.0, 3.0, 4.0]),)],
        lambda k, x: 0.3 * next(k[0]) + 0.7 * next(k[1][0]),
    ),
    "count in a dict": (lambda: {"i": itertools.count(1)}, lambda k, x: 1 / next(k["i"])),
    "views of one tensor": (
        lambda: (lambda t: [t, t[:1]])(torch.ones(2)),
        lambda k, x: float(k[1].mul_(0.9)) + float(k[0].sum()),
    ),
    "set": (lambda: {0}, lambda k, x: k.add(len(k)) or len(k)),
    "generator of numbers": (
        lambda: [np.random.default_rng(0), torch.Generator().manual_seed(0)],
        lambda k, x: k[0].random() + float(torch.rand((), generator=k[1])),
    ),
}


def keeping(name):
    make, mutate = STATE[name]

    class Keeping(Mlp):
        def __init__(self):
            super().__init__("momentum")
            if name == "hparams":
                self.save_hyperparameters(make())
                self.state = self.hparams
            else:
                self.state = make()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (1 + 0.05 * float(mutate(self.state, 0.5)))

    return Keeping


@pytest.mark.parametrize("name", STATE)
def test_state_of_every_kind(name):
    kind = keeping(name)
    for make in ESTIMATORS.values():
        assert_undisturbed(kind, make)
    assert_exact(kind)


# ------------------------------------------------------------------------------ methods with state


def in_a_default():
    class Default(Mlp):
        def training_step(self, batch, batch_idx, calls=[0]):  # noqa: B006
            calls[0] += 1
            return super().training_step(batch, batch_idx) * (1 + 0.1 * calls[0])

    return Default()


def in_a_default_by_name():
    class Default(Mlp):
        @staticmethod
        def factor(*, memo={"calls": 0}):  # noqa: B006
            memo["calls"] += 1
            return 1 + 0.1 * memo["calls"]

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.factor()

    return Default()


def in_a_generator_by_default():
    class Default(Mlp):
        def factor(self, generator=torch.Generator().manual_seed(3)):  # noqa: B008
            return 1 + 0.1 * float(torch.rand((), generator=generator))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.factor()

    generator = Default.factor.__defaults__[0]
    generator.manual_seed(3)
    return Default()


METHODS = [
    in_a_default,
    in_a_default_by_name,
    in_a_generator_by_default,
]


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_what_methods_keep(kind, make):
    assert_undisturbed(kind, make)
    assert_exact(kind)


def helper(x, *, memo={"calls": 0}):  # noqa: B006
    memo["calls"] += 1
    return x * (1 + 0.1 * memo["calls"])


class Helped(Mlp):
    def training_step(self, batch, batch_idx):
        return helper(super().training_step(batch, batch_idx))


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_what_functions_outside_keep_is_named(make):
    with pytest.warns(UserWarning, match=r"outside of the module.*'helper\(memo=…\)"):
        observe(make(), Helped())


# ------------------------------------------------------------------------------- context variables

COUNT = contextvars.ContextVar("COUNT", default=0)
SCALE = contextvars.ContextVar("SCALE")


class Context(Mlp):
    """Counts its steps in a variable of the context, and scales the loss by another."""

    def on_fit_start(self):
        super().on_fit_start()
        COUNT.set(0)

    def training_step(self, batch, batch_idx):
        COUNT.set(COUNT.get() + 1)
        SCALE.set(1.0 + 0.1 * COUNT.get())
        return super().training_step(batch, batch_idx) * SCALE.get()


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_context_variables(make):
    assert_undisturbed(Context, make)
    assert COUNT.get() == STEPS
    assert_exact(Context)
    late, at_once = (observe(UnrollK(4, mode), Context()) for mode in ("reverse", "forward"))
    assert relative_error(last_hypergradient(late), last_hypergradient(at_once)) < 1e-5


# --------------------------------------------------------------------------------------- iterators


def _generator():
    yield from itertools.count(1)


@pytest.mark.parametrize(
    "make",
    [
        _generator,
        lambda: map(float, _generator()),
        lambda: iter(torch.utils.data.DataLoader(range(1, 99))),
    ],
    ids=["generator", "map", "DataLoader"],
)
@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_an_iterator_that_cannot_be_put_back_is_refused_by_name(make, where):
    class Drawing(Mlp):
        def __init__(self):
            super().__init__()
            self.source = {"numbers": make()}

    def step(self, batch, batch_idx):
        return self.loss(batch) / float(next(self.source["numbers"]))

    setattr(Drawing, where, step)
    model = Drawing()
    before = weights(model)
    with pytest.raises(Exception, match=r"advances \"source\['numbers'\]\".*on_train_batch_start"):
        observe(T1T2(), model)
    assert torch.equal(weights(model), before)
    assert float(next(model.source["numbers"])) == 1  # nothing has been drawn


class Endless(Mlp):
    """Draws further batches from a loader in the step, and begins it again at its end."""

    def __init__(self, errors):
        super().__init__()
        self.errors = errors
        self.more = torch.utils.data.DataLoader(range(1, 6), shuffle=True)
        self.source = None

    def training_step(self, batch, batch_idx):
        try:
            more = next(self.source)
        except self.errors:
            self.source = iter(self.more)
            more = next(self.source)
        return super().training_step(batch, batch_idx) * (1 + 0.1 * float(more))


@pytest.mark.parametrize("errors", [(StopIteration, TypeError), Exception, BaseException])
@pytest.mark.parametrize("make", [ClipR, lambda: UnrollK(2, "reverse"), lambda: UnrollK(2)])
def test_an_iterator_that_the_step_makes_is_refused_before_anything_moves(errors, make):
    model = Endless(errors)
    before = weights(model)
    with pytest.raises(Exception, match=r"advances 'source', a _SingleProcessDataLoaderIter"):
        observe(make(), model)
    assert torch.equal(weights(model), before)


def test_one_step_ahead_an_iterator_that_the_step_makes_is_none_of_ours():
    found = []
    for callback in ([], OnlineHPOCallback(T1T2(), optimizer=frozen)):
        torch.manual_seed(5)
        model = Endless((StopIteration, TypeError))
        fit(model, callback)
        found.append(weights(model))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("errors", [StopIteration, Exception, BaseException])
@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_a_refusal_cannot_be_caught_by_the_step(errors, where):
    class Drawing(Mlp):
        def __init__(self):
            super().__init__()
            self.source = iter(torch.utils.data.DataLoader(range(1, 99)))

        def draw(self, batch, batch_idx):
            try:
                number = float(next(self.source))
            except errors:
                number = 1.0
            return self.loss(batch) / number

    setattr(Drawing, where, Drawing.draw)
    model = Drawing()
    before = weights(model)
    with pytest.raises(Exception, match=r"advances 'source'.*on_train_batch_start"):
        observe(T1T2(), model)
    assert torch.equal(weights(model), before)


# -------------------------------------------------------------------------------- large containers


class Large(Mlp):
    def __init__(self, make=None, use=lambda kept, x: 1.0):
        super().__init__("momentum")
        self.large = make() if make else None
        self.use = use

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (1 + 0.01 * self.use(self.large, loss.item()))


def _count(kept, x):
    kept["w7"] += 1
    return kept["w7"]


def _append(kept, x):
    kept.append(x)
    return len(kept) / 1000


def _deep(kept, x):
    kept[1500]["n"] += 1
    return kept[1500]["n"]


LARGE = {
    "read": (lambda: {f"w{i}": i for i in range(2000)}, lambda kept, x: kept["w7"]),
    "counted": (lambda: {f"w{i}": i for i in range(2000)}, _count),
    "appended": (lambda: list(range(2000)), _append),
    "bounded": (lambda: collections.deque(range(2000), maxlen=2000), _append),
    "deep": (lambda: [{"n": 0} for _ in range(2000)], _deep),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_containers_are_put_back_like_others(name):
    make, use = LARGE[name]

    class Own(Large):
        def __init__(self):
            super().__init__(make, use)

        def kept(self):
            return self.large

    for estimator in ESTIMATORS.values():
        assert_undisturbed(Own, estimator)
    assert_exact(Own)


def test_a_large_container_that_is_only_read_is_not_copied():
    model = Large(lambda: {f"w{i}": {"count": i} for i in range(2000)})
    walker = Walker(model)
    for call in range(8):
        reached = walker.walk(looks=True)
        assert (id(model.large) in reached.held) == (call < 5)
        assert (id(model.large["w5"]) in reached.held) == (call < 5)
        walker.judge(reached, {})
    assert id(model.large) in reached.lengths


@pytest.mark.parametrize(
    "make",
    [
        lambda: {i: {j: {k: {} for k in range(9)} for j in range(9)} for i in range(15)},
        lambda: [list(range(50)) for _ in range(90)],
    ],
    ids=["trie", "lists"],
)
def test_many_small_containers_together_are_large(make):
    model = Large(make)
    model.counts = [{"n": 0} for _ in range(9)]
    model.changing = [{j: {k: k for k in range(9)} for j in range(9)} for _ in range(30)]
    walker = Walker(model)
    for _ in range(8):
        reached = walker.walk(looks=True)
        model.changing[3][2][1] += 1
        walker.judge(reached, {})
    assert id(model.large) in reached.held
    assert id(model.large[0]) not in reached.held
    assert id(model.counts[0]) in reached.held  # small, and copied each time
    assert id(model.changing[3][2]) in reached.held


def test_a_large_container_that_loses_entries_later_is_named():
    class Losing(Large):
        def training_step(self, batch, batch_idx):
            if self.global_step > 8:
                self.large.pop()
            return super().training_step(batch, batch_idx)

    with pytest.raises(Exception, match=r"took away from 'large', a container of 199. entries"):
        observe(ClipR(), Losing(lambda: list(range(2000))))


def test_large_containers_that_change_later_are_warned_about():
    class Later(Large):
        def training_step(self, batch, batch_idx):
            if self.global_step > 6:
                self.large["w7"] += 1
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="steps change 'large', which has 2000 entries"):
        observe(ClipR(), Later(lambda: {f"w{i}": i for i in range(2000)}), steps=60, max_epochs=-1)


# ----------------------------------------------------------------------------------------- teachers


class Teacher(Mlp):
    """Handed to the optimizer with the rest, and moved by the step itself."""

    in_place = False

    def __init__(self):
        super().__init__("momentum")
        self.teacher = copy.deepcopy(self.net)
        self.extra = [copy.deepcopy(self.net[0])]

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            pairs = zip(self.teacher.parameters(), self.net.parameters(), strict=True)
            for slow, p in [*pairs, (self.extra[0].weight, self.net[0].weight)]:
                if self.in_place:
                    slow.mul_(0.8).add_(0.2 * p)
                else:
                    slow.data = 0.8 * slow.data + 0.2 * p.data
            target = self.teacher(batch[0]) + self.extra[0].weight.sum()
        return self.loss(batch) + F.mse_loss(self.net(batch[0]), target)


class InPlace(Teacher):
    in_place = True


class Later(Teacher):
    """Follows from the fifth step on."""

    def training_step(self, batch, batch_idx):
        if self.global_step < 5:
            return self.loss(batch)
        return super().training_step(batch, batch_idx)


class Following(torch.optim.SGD):
    """Moves a teacher, which is among what it is given, after the rest."""

    def __init__(self, parameters, pairs):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.pairs = pairs

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for slow, p in self.pairs:
            slow.lerp_(p, 0.1)
        return loss


class OfOptimizer(Mlp):
    def __init__(self):
        super().__init__("momentum")
        self.teacher = copy.deepcopy(self.net[0])
        self.extra = [self.teacher]

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.teacher(batch[0])
        return self.loss(batch) + F.mse_loss(self.net[0](batch[0]), target)

    def configure_optimizers(self):
        pairs = zip(self.teacher.parameters(), self.net[0].parameters(), strict=True)
        return Following(self.parameters(), list(pairs))


@pytest.mark.parametrize("derivatives", ["auto", "finite_difference"])
@pytest.mark.parametrize("kind", [Teacher, InPlace, Later, OfOptimizer])
def test_teachers_inside_the_optimizer(kind, derivatives):
    alone = kind()
    fit(alone)
    for make in ESTIMATORS.values():
        observed = kind()
        observe(make(), observed, derivatives=derivatives)
        assert torch.equal(weights(observed), weights(alone))
        assert torch.equal(observed.extra[0].weight, alone.extra[0].weight)


@pytest.mark.parametrize("write", [lambda p: p.data.mul_(0.9), lambda p: p.mul_(0.9)])
def test_a_step_that_writes_to_what_it_trains_is_refused(write):
    class Writing(Mlp):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                write(self.net[0].weight)
            return super().training_step(batch, batch_idx)

    model = Writing()
    before = weights(model)
    with pytest.raises(Exception, match=r"writes to the trained parameter 'net\.0\.weight'"):
        observe(T1T2(), model)
    assert torch.equal(weights(model), before)


# ---------------------------------------------------------------------------------------- gradients


class Adversarial(Mlp):
    """Its inner pass leaves gradients, and clears them."""

    where = "training_step"

    def attacked(self, batch):
        x, y = batch
        x = x.clone().requires_grad_()
        self.loss((x, y)).backward()
        self.zero_grad()
        return x + 0.1 * x.grad.sign(), y

    def training_step(self, batch, batch_idx):
        return self.loss(batch) + self.loss(self.attacked(batch))


class AdversarialValidation(Mlp):
    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            attacked = Adversarial.attacked(self, batch)
        return self.loss(attacked)


class Accumulating(Adversarial):
    """Leaves the parameters' gradients alone, but clears them one by one at the end."""

    def attacked(self, batch):
        x, y = batch
        x = x.clone().requires_grad_()
        self.loss((x, y)).backward()
        for p in self.parameters():
            p.grad = None
        return x + 0.1 * x.grad, y


@pytest.mark.parametrize("make", [*ESTIMATORS.values(), lambda: UnrollK(2, "forward")])
@pytest.mark.parametrize("kind", [Adversarial, Accumulating])
def test_a_step_that_loses_accumulated_gradients_is_warned_about(kind, make):
    with pytest.warns(
        UserWarning, match=r"earlier micro-batches are gone.*zero_grad.*grad in"
    ) as w:
        observe(make(), kind("momentum"), accumulate_grad_batches=3, max_epochs=4)
    assert sum("micro-batches are gone" in str(each.message) for each in w) == 1


class Scaling(Mlp):
    """Has other gradients put in place after each backward pass, which stay."""

    def on_after_backward(self):
        for p in self.net.parameters():
            p.grad = p.grad * 0.9


@pytest.mark.parametrize("make", [*ESTIMATORS.values(), lambda: UnrollK(2, "forward")])
@pytest.mark.parametrize("kind", [Mlp, AdversarialValidation, Scaling])
def test_accumulated_gradients_that_stay_are_not_warned_about(kind, make):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*micro-batches are gone")
        observe(make(), kind("momentum"), accumulate_grad_batches=3, every_n_steps=5, max_epochs=4)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", [Adversarial, Accumulating, AdversarialValidation])
def test_steps_that_write_gradients(kind, accumulated):
    if accumulated == 2 and kind is not AdversarialValidation:
        return  # the step itself would clear what has been accumulated
    alone = kind("momentum")
    fit(alone, accumulate_grad_batches=accumulated)
    for make in [*ESTIMATORS.values(), lambda: UnrollK(3, "forward")]:
        for derivatives in ("auto", "finite_difference"):
            observed = kind("momentum")
            observe(make(), observed, derivatives=derivatives, accumulate_grad_batches=accumulated)
            assert torch.equal(weights(observed), weights(alone))


# ------------------------------------------------------------------ memory and flags of other kinds


class OtherMemory(Mlp):
    """Counts in memory that is no tensor, or too large to be copied every time."""

    make, add = None, None

    def __init__(self):
        super().__init__("momentum")
        self.memory = type(self).make()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss / (1 + 0.01 * type(self).add(self.memory))


def _add(memory):
    memory[0] += 1
    return float(memory[0])


def _add_unseen(memory):
    """As torch does not count it."""
    memory.data[0] += 1
    return float(memory[0])


def _add_value(memory):
    memory.value += 1
    return memory.value


def _add_attribute(memory):
    memory.n = getattr(memory, "n", 0) + 1
    return memory.n


def _add_deep(memory):
    memory[0].append(1)
    return len(memory[0])


def _add_masked(memory):
    memory[int(np.ma.getmaskarray(memory).sum())] = np.ma.masked
    return np.ma.getmaskarray(memory).sum()


def _objects():
    array = np.empty(2, dtype=object)
    array[0] = []
    return array


class Kept:
    """Is held by this file alone."""


KEPT = Kept()
MEMORIES = {
    "array": (lambda: array.array("d", [0.0]), _add),
    "bytearray": (lambda: bytearray(1), _add),
    "memoryview": (lambda: memoryview(bytearray(1)), _add),
    "storage": (lambda: torch.zeros(1).untyped_storage(), _add),
    "ctypes": (lambda: ctypes.c_int(0), _add_value),
    "shared": (lambda: multiprocessing.Value("i", 0), _add_value),
    "local": (threading.local, _add_attribute),
    "weak": (lambda: weakref.ref(KEPT), lambda memory: _add_attribute(memory())),
    "objects": (_objects, _add_deep),
    "masked": (lambda: np.ma.zeros(20), _add_masked),
    "large array": (lambda: np.zeros(1_100_000), _add),
    "large tensor": (lambda: torch.zeros(1_100_000), _add),
    "large, unseen": (lambda: torch.zeros(1_100_000), _add_unseen),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_memory_of_other_kinds_is_put_back(name):
    make, add = MEMORIES[name]

    class Own(OtherMemory):
        def on_train_start(self):
            KEPT.n = 0

    Own.make, Own.add = make, add
    for estimator in ESTIMATORS.values():
        assert_undisturbed(Own, estimator)
    assert_exact(Own)


class HeadTeacher(Mlp):
    """A frozen backbone, and a teacher that follows the head above it."""

    in_place = False

    def __init__(self):
        super().__init__("momentum")
        self.backbone = nn.Sequential(nn.Linear(4, 120), nn.Linear(120, 120), nn.Linear(120, 4))
        self.backbone.requires_grad_(False)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, batch):
        return F.cross_entropy(self.net(self.backbone(batch[0])), batch[1])

    def training_step(self, batch, batch_idx):
        for slow, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            if self.in_place:
                with torch.no_grad():
                    slow.mul_(0.5).add_(p, alpha=0.5)
            else:
                slow.data = 0.5 * slow.data + 0.5 * p.data
        features = self.backbone(batch[0])
        return F.cross_entropy(self.net(features), batch[1]) + F.mse_loss(
            self.net(features), self.teacher(features).detach()
        )


class MergedInValidation(HeadTeacher):
    """A large frozen weight takes up another one in evaluation mode, as low-rank adapters do."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.backbone[1].weight.data = self.backbone[1].weight.data * 1.01
        return self.loss(batch)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kind", [HeadTeacher, MergedInValidation])
def test_beside_a_frozen_backbone(kind, in_place, make, monkeypatch):
    monkeypatch.setattr(shield, "_SMALL", 8)  # the teacher is as small as the head

    def build():
        torch.manual_seed(1)
        model = kind()
        model.in_place = in_place
        return model

    assert_undisturbed(build, make)


class FreezesWhenEvaluated(Mlp):
    def train(self, mode=True):
        super().train(mode)
        if not mode:
            self.net[0].requires_grad_(False)
        return self


class FreezesInStep(Mlp):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.global_step == 3:
            self.net[0].bias.requires_grad_(False)
        return loss


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("kind", [FreezesWhenEvaluated, FreezesInStep])
def test_parameters_that_are_frozen_meanwhile(kind, make):
    """The flags of the replay are put back, so that the training goes on with its own."""
    observed, alone = kind(), kind()
    options = {"num_sanity_val_steps": 0, "limit_val_batches": 0}
    fit(observed, OnlineHPOCallback(make(), optimizer=frozen, dataloader=valid_loader()), **options)
    fit(alone, **options)
    assert torch.equal(weights(observed), weights(alone))
    assert [p.requires_grad for p in observed.parameters()] == [
        p.requires_grad for p in alone.parameters()
    ]


# ---------------------------------------------------------------------------- attributes of classes


class OfTheClass(Mlp):
    """Keeps everything with the class, as a slip or on purpose."""

    seen = []  # noqa: RUF012
    last = None
    counter = 0
    scale = torch.ones(())
    numbers = itertools.count(1)

    def __init__(self):
        super().__init__("momentum")
        kind = OfTheClass
        kind.seen, kind.last, kind.counter, kind.scale = [], None, 0, torch.ones(())
        kind.numbers = itertools.count(1)
        vars(kind).get("late") and delattr(kind, "late")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss.item())
        OfTheClass.counter += 1
        type(self).last = batch_idx
        type(self).late = getattr(self, "late", 0) + 1
        self.scale.mul_(0.97)
        factor = self.scale + 0.01 * (self.counter + len(self.seen) + self.late)
        return loss * (factor + 0.01 / next(self.numbers))

    def kept(self):
        return (self.seen, self.last, self.counter, self.late, float(self.scale), str(self.numbers))


class Meter:
    """An object whose class counts."""

    total = 0.0

    def update(self, x):
        Meter.total += x
        return Meter.total


class OfAPart(Mlp):
    """So do the classes of what it holds."""

    def __init__(self):
        super().__init__("momentum")
        Meter.total = 0.0
        self.parts = [nn.ModuleList([Counted()]), Meter()]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (1 + 0.01 * self.parts[0][0](self.parts[1].update(1.0)))

    def kept(self):
        return Meter.total, Counted.calls


class Counted(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        Counted.calls = 0

    def forward(self, x):
        Counted.calls += 1
        return x + Counted.calls


@pytest.mark.parametrize("kind", [OfTheClass, OfAPart])
def test_attributes_of_classes(kind):
    for make in ESTIMATORS.values():
        results = []
        for callback in (OnlineHPOCallback(make(), optimizer=frozen), None):
            model = kind()
            fit(model, callback)
            results.append((weights(model), copy.deepcopy(model.kept())))
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
    assert_exact(kind)


def test_classes_of_libraries_are_left_alone():
    """Walking through them would take long, and nothing of a step is kept there."""
    reached = Walker(Mlp()).walk()
    owners = [held.owner for held in reached.held.values() if isinstance(held.owner, type)]
    assert owners == [Mlp]


# ------------------------------------------------------------- gradients and views kept by the step


class MovesPrompt(Mlp):
    """Adversarial training for free: moves a perturbation by what the last step has left."""

    def __init__(self):
        super().__init__("momentum")
        self.prompt = self.make_prompt()

    def make_prompt(self):
        return torch.zeros(4, requires_grad=True)

    def training_step(self, batch, batch_idx):
        if self.prompt.grad is not None:
            self.prompt.data.add_(0.1 * self.prompt.grad.sign())
            self.prompt.grad.zero_()
        return self.loss((batch[0] + self.prompt, batch[1]))

    def kept(self):
        return self.prompt.tolist(), str(self.prompt.grad)


class MovesParameter(MovesPrompt):
    def make_prompt(self):
        return nn.Parameter(torch.zeros(4))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("kind", [MovesPrompt, MovesParameter])
def test_gradients_of_leaves_that_no_optimizer_moves(kind):
    for make in ESTIMATORS.values():
        assert_undisturbed(kind, make)
    assert_exact(kind)


class Transposed(Mlp):
    """Decodes with a view of the weight that encodes."""

    def __init__(self):
        super().__init__("momentum")
        self.decoder = self.view(self.net[0].weight)

    def view(self, weight):
        return weight.t()

    def training_step(self, batch, batch_idx):
        decoded = F.linear(torch.tanh(self.net[0](batch[0])), self.decoder.reshape(4, 5))
        return self.loss(batch) + F.mse_loss(decoded, batch[0])


class Flattened(Transposed):
    def view(self, weight):
        return weight.view(-1)


@pytest.mark.parametrize("kind", [Transposed, Flattened])
@pytest.mark.parametrize("derivatives", ["auto", "finite_difference"])
def test_views_of_weights(kind, derivatives):
    for make in (lambda: ClipR(math.inf), lambda: UnrollK(STEPS, "reverse")):
        every = {} if isinstance(make(), ClipR) else {"every_n_steps": STEPS}
        callback = observe(make(), kind(), derivatives=derivatives, **every)
        assert relative_error(last_hypergradient(callback), truth(kind)) < 1e-5
    # Replays make the node of a view anew, which reorders a sum by one rounding; walks must not.
    assert_undisturbed(kind, T1T2)


# ------------------------------------------------------------- iterators that draw from one another


class Drawing(Mlp):
    def __init__(self):
        super().__init__("momentum")
        self.source = self.make()

    def make(self):
        return itertools.chain([1.0, 2.0] * 20, [3.0])

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (1 + 0.1 * next(self.source))


class Chained(Drawing):
    def make(self):
        chain = itertools.chain.from_iterable([[1.0, 2.0, 3.0]] * 20)
        next(chain)
        return chain


class Repeated(Drawing):
    def make(self):
        return itertools.chain(*itertools.repeat([1.0, 2.0], 20))


class Alternating(Drawing):
    """Two attributes draw from one."""

    def make(self):
        self.numbers = iter([float(i) for i in range(100)])
        return map(float, self.numbers)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + 0.01 * next(self.numbers))


@pytest.mark.parametrize("kind", [Drawing, Chained, Repeated, Alternating])
def test_iterators_that_draw_from_others(kind):
    for make in ESTIMATORS.values():
        assert_undisturbed(kind, make)
    assert_exact(kind)


# ------------------------------------------------------------------------- attributes of tensors


class OnParameters(Mlp):
    """Keeps what belongs to a parameter as attributes of it."""

    def __init__(self):
        super().__init__("momentum")
        weight = self.net[0].weight
        weight.n, weight.seen = 0, []

    def training_step(self, batch, batch_idx):
        weight = self.net[0].weight
        weight.n += 1
        weight.seen.append(batch_idx)
        return self.loss(batch) * (1 + 0.1 * weight.n + 0.01 * len(weight.seen))

    def kept(self):
        return self.net[0].weight.n, self.net[0].weight.seen


class FirstSetByAStep(OnParameters):
    def __init__(self):
        Mlp.__init__(self, "momentum")

    def training_step(self, batch, batch_idx):
        weight = self.net[0].weight
        if not hasattr(weight, "n"):
            weight.n, weight.seen = 0, []
        return super().training_step(batch, batch_idx)


class Average(OnParameters):
    """A tensor that is the attribute of a buffer, which is one of a parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("own", torch.ones(1))
        self.net[2].weight.own = self.own
        self.own.ema = torch.zeros(1)

    def training_step(self, batch, batch_idx):
        average = self.net[2].weight.own.ema.add_(1)
        return super().training_step(batch, batch_idx) * (1 + 0.1 * float(average))

    def kept(self):
        return float(self.own.ema), *super().kept()


@pytest.mark.parametrize("kind", [OnParameters, FirstSetByAStep, Average])
@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_attributes_of_tensors(kind, make):
    assert_undisturbed(kind, make)
    assert_exact(kind)


def test_attributes_of_tensors_are_named():
    module = OnParameters()
    assert Walker(module).path_of(module.net[0].weight.seen) == "net.0.weight.seen"


class ReadsAnAttribute(Mlp):
    """What stands for a parameter has its attributes."""

    def __init__(self):
        super().__init__("momentum")
        self.net[0].weight.factor = 0.9
        self.register_buffer("centre", torch.zeros(3))

    def training_step(self, batch, batch_idx):
        output = self.net(batch[0]) * self.net[0].weight.factor
        with torch.no_grad():
            self.centre.lerp_(output.mean(0), 0.3)
        return F.cross_entropy(output - self.centre, batch[1])


@pytest.mark.filterwarnings("ignore:.*uses finite differences")
def test_what_stands_for_a_parameter_has_its_attributes():
    assert_exact(ReadsAnAttribute)


# ------------------------------------------------------------------ bound methods written in C


def _draw(method):
    return float(method())


def _grow(make_entry):
    def call(method):
        method(make_entry())
        return len(method.__self__)

    return call


BUILTINS = {
    "random": (lambda: random.Random(0).random, _draw),
    "torch": (
        lambda: torch.Generator().manual_seed(0).clone_state().manual_seed,
        lambda m: float(torch.rand((), generator=m.__self__)),
    ),
    "numpy": (lambda: np.random.default_rng(0).normal, _draw),
    "legacy numpy": (lambda: np.random.RandomState(0).rand, _draw),
    "deque": (lambda: collections.deque([0.0], maxlen=30).append, _grow(float)),
    "list": (lambda: [].append, _grow(float)),
    "set": (lambda: {0}.update, _grow(lambda: [random.random()])),
    "dict": (lambda: {}.setdefault, lambda m: m(len(m.__self__), 1.0) + len(m.__self__)),
    "operator": (lambda: [].__iadd__, _grow(lambda: [1.0])),
    "tensor": (lambda: torch.ones(1).mul_, lambda m: float(m(0.9))),
    "iterator": (lambda: iter([1.0 + i for i in range(20)]).__next__, _draw),
    "count": (lambda: (itertools.count(1).__next__,), lambda m: _draw(m[0])),
}


@pytest.mark.parametrize("name", BUILTINS)
def test_bound_methods_written_in_c(name):
    make, call = BUILTINS[name]

    class Bound(Mlp):
        def __init__(self):
            super().__init__("momentum")
            self.call = make()

        def training_step(self, batch, batch_idx):
            return self.loss(batch) * (1 + 0.1 * call(self.call))

    for estimator in ESTIMATORS.values():
        random.seed(1)
        assert_undisturbed(Bound, estimator)
    assert_exact(Bound)


class Nameless:
    """Its class does not say where it is defined, as those that Cython makes for functions."""

    __module__ = property(lambda self: __name__)

    def __init__(self):
        self.count = 0

    def step(self):
        self.count += 1
        return self.count


def test_a_class_without_the_name_of_its_module():
    class Holding(Mlp):
        def __init__(self):
            super().__init__("momentum")
            self.state = Nameless()

        def training_step(self, batch, batch_idx):
            return self.loss(batch) * (1 + 0.1 * self.state.step())

    assert not isinstance(Nameless.__module__, str)
    for estimator in ESTIMATORS.values():
        assert_undisturbed(Holding, estimator)
    assert_exact(Holding)


def test_a_method_of_an_iterator_that_cannot_be_put_back_is_refused_by_name():
    class Drawing(Mlp):
        def __init__(self):
            super().__init__()
            self.draw = _generator().__next__

        def training_step(self, batch, batch_idx):
            return self.loss(batch) / self.draw()

    model = Drawing()
    with pytest.raises(Exception, match=r"advances 'draw.__self__', a generator"):
        observe(T1T2(), model)
    assert model.draw() == 1
