"""Buffers that only the training loss reads are state that training moves, as any other."""

import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import (
    Mlp,
    StopAfter,
    fit,
    frozen,
    last_hypergradient,
    observe,
    relative_error,
    train_loader,
    truth,
)
from torch import nn

from lightning_hpo import T1T2, ClipR, Implicit, OnlineHPOCallback, UnrollK
from lightning_hpo.derivatives import gradient
from lightning_hpo.statistics import RunningStatistics

STEPS = 6
ESTIMATORS = {
    "ClipR": lambda: ClipR(math.inf),
    "forward": lambda: UnrollK(STEPS, "forward"),
}


class Base(Mlp):
    """A classifier with a term that depends on what earlier steps have left in a buffer."""

    def __init__(self):
        super().__init__("momentum", granularity="model", schedule=False)
        self.make()

    def training_step(self, batch, batch_idx):
        hidden = self.net[:2](batch[0])
        return self.loss(batch) + self.term(hidden, batch[1])


class Centred(Base):
    """DINO's centre: read and written under no_grad, after the loss."""

    def make(self):
        self.register_buffer("centre", torch.zeros(1, 3))

    def term(self, hidden, y):
        student = self.net[2](hidden)
        teacher = F.softmax((student.detach() - self.centre) / 0.2, -1).detach()
        with torch.no_grad():
            self.centre = 0.6 * self.centre + 0.4 * student.mean(0, keepdim=True)
        return -(teacher * F.log_softmax(student, -1)).sum(-1).mean()


class ClassCentres(Base):
    """Means of the classes, which the loss reads with a graph."""

    def make(self):
        self.register_buffer("centres", torch.zeros(3, 5))

    def term(self, hidden, y):
        with torch.no_grad():
            for k in range(3):
                if (y == k).any():
                    self.centres[k].lerp_(hidden[y == k].mean(0), 0.3)
        return (hidden - self.centres[y]).square().sum(-1).mean()


class Codebook(Base):
    """Codes that follow as sums over counts (van den Oord et al. 2017, appendix)."""

    decay = 0.7

    def make(self):
        generator = torch.Generator().manual_seed(3)
        codes = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        self.register_buffer("codes", codes)
        self.register_buffer("sums", codes.clone())
        self.register_buffer("counts", torch.ones(4))

    def term(self, hidden, y):
        index = torch.cdist(hidden.detach(), self.codes).argmin(1)
        taken = F.one_hot(index, 4).to(hidden)
        quantized = self.codes[index].detach()
        self.counts.data.mul_(self.decay).add_(taken.sum(0).detach(), alpha=1 - self.decay)
        self.sums.data.mul_(self.decay).add_(taken.t() @ hidden.detach(), alpha=1 - self.decay)
        self.codes.data.copy_(self.sums / self.counts.unsqueeze(1))
        return 0.5 * (hidden - quantized).square().sum(-1).mean()


class FirstFilled(Codebook):
    """The first batch fills the codes, so that the first step shows nothing of what follows."""

    def make(self):
        super().make()
        self.register_buffer("is_filled", torch.tensor(False))

    def term(self, hidden, y):
        if not self.is_filled:
            self.codes.copy_(hidden[:4].detach())
            self.sums.copy_(hidden[:4].detach())
            self.is_filled.fill_(True)
        return super().term(hidden, y)


class Bank(Base):
    """A queue of features, as in MoCo."""

    def make(self):
        generator = torch.Generator().manual_seed(4)
        self.register_buffer("queue", torch.randn(24, 5, generator=generator, dtype=torch.float64))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))

    def term(self, hidden, y):
        similar = hidden @ self.queue.clone().detach().t()
        start = int(self.position)
        with torch.no_grad():
            self.queue[start : start + len(hidden)] = hidden
        self.position[0] = (start + len(hidden)) % 24
        return 0.3 * similar.logsumexp(1).mean()


class Chained(Base):
    """Averages of averages that start alike: the first step writes to them what they hold."""

    def make(self):
        for name in "abc":
            self.register_buffer(name, torch.ones(5))

    def term(self, hidden, y):
        target = (hidden.detach() * self.c).softmax(1)
        with torch.no_grad():
            self.c.copy_(0.5 * self.c + 0.5 * self.b)
            self.b.copy_(0.5 * self.b + 0.5 * self.a)
            self.a.copy_(hidden.exp().mean(0))
        return -(target * hidden.log_softmax(1)).sum(1).mean()


class Rows(Base):
    """Means that are kept in one row after the other, all of which are zero at first."""

    def make(self):
        self.register_buffer("rows", torch.zeros(2, 5))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def term(self, hidden, y):
        row = int(self.count) % 2
        loss = (hidden.mean(0) - self.rows[row]).square().sum()
        with torch.no_grad():
            self.rows[row] = 0.5 * self.rows[row] + 0.5 * hidden.mean(0)
            self.count += 1
        return loss


class Whitened(Base):
    """Running moments, written with a graph, that scale a term of the loss."""

    def make(self):
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("square", torch.ones(5))

    def term(self, hidden, y):
        whitened = (hidden - self.mean.clone()) * self.square.clone().rsqrt()
        F.batch_norm(hidden, self.mean, self.square, training=True, momentum=0.3)
        return whitened.pow(4).mean()


class ReadAfterwards(Base):
    """What a layer of torch has just written has no graph in the training, but in a replay."""

    def make(self):
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("square", torch.ones(5))

    def term(self, hidden, y):
        F.batch_norm(hidden, self.mean, self.square, training=True, momentum=0.3)
        return F.batch_norm(hidden, self.mean, self.square).pow(4).mean()


class Overwritten(Base):
    """Filled anew by each step before it is read, and means that nobody reads."""

    def make(self):
        self.register_buffer("last", torch.zeros(5))
        self.register_buffer("seen", torch.zeros(5))

    def term(self, hidden, y):
        with torch.no_grad():
            self.last.copy_(hidden.mean(0))
            self.seen.lerp_(hidden.mean(0), 0.1)
        return (hidden - self.last).square().mean()


class Annealed(Base):
    """A number that each step moves, but no parameter."""

    def make(self):
        self.register_buffer("temperature", torch.tensor(1.0))

    def term(self, hidden, y):
        self.temperature *= 0.9
        return (hidden / self.temperature).square().mean()


class Refreshed(Base):
    """A reference that some steps fill anew before they read it, and others only read."""

    @staticmethod
    def is_due(batch_idx):
        return batch_idx % 3 == 0

    def make(self):
        self.register_buffer("reference", torch.zeros(5))

    def training_step(self, batch, batch_idx):
        self.idx = batch_idx
        return super().training_step(batch, batch_idx)

    def term(self, hidden, y):
        if self.is_due(self.idx):
            self.reference.copy_(hidden.mean(0).detach() * 3)
        return (hidden - self.reference).square().mean()


class FilledOnce(Refreshed):
    """At the third step."""

    def is_due(self, batch_idx):
        return self.global_step == 2


WITHOUT_GRAPH = [
    *(Centred, ClassCentres, Codebook, FirstFilled, Bank, Chained, Rows),
    Refreshed,
]


@pytest.mark.parametrize("kind", WITHOUT_GRAPH)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hypergradients_equal_whole_trainings(kind, estimator):
    expected = truth(kind, steps=STEPS)
    assert expected.abs().min() > 1e-4
    with pytest.warns(UserWarning, match="uses finite differences, because .* without a graph"):
        result = observe(ESTIMATORS[estimator](), kind(), steps=STEPS)
    assert relative_error(last_hypergradient(result), expected) < 1e-5


@pytest.mark.parametrize("derivatives", ["auto", "reverse", "forward", "finite_difference"])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "reverse"])
def test_what_is_written_with_a_graph(estimator, derivatives):
    make = {**ESTIMATORS, "reverse": lambda: UnrollK(STEPS, "reverse")}[estimator]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(without a graph|as constants)")
        result = observe(
            make(), Whitened(), steps=STEPS, derivatives=derivatives, every_n_steps=STEPS
        )
    assert relative_error(last_hypergradient(result), truth(Whitened, steps=STEPS)) < 1e-5


@pytest.mark.parametrize("derivatives", ["auto", "finite_difference"])
@pytest.mark.parametrize("kind", WITHOUT_GRAPH)
def test_reverse_mode_takes_them_as_constants_and_says_so(kind, derivatives):
    with pytest.warns(UserWarning, match="as constants, because .*without a graph"):
        result = observe(
            UnrollK(STEPS, "reverse"),
            kind(),
            steps=STEPS,
            derivatives=derivatives,
            every_n_steps=STEPS,
        )
    assert relative_error(last_hypergradient(result), truth(kind, steps=STEPS)) > 1e-3


def test_slow_averages_in_single_precision_are_found_beside_many_layers():
    """What they move by is little beside what they, and running statistics, hold."""

    class Slow(ClassCentres):
        def make(self):
            super().make()
            self.centres += 1
            self.norms = nn.Sequential(*(nn.BatchNorm1d(4, momentum=0.5) for _ in range(9)))
            self.float()

        def term(self, hidden, y):
            with torch.no_grad():
                self.centres.lerp_(hidden.mean(0).expand(3, 5), 1e-3)
            return (hidden - self.centres[y]).square().mean()

        def loss(self, batch):
            return super().loss([self.norms(batch[0].float()), batch[1]])

        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0].float(), batch[1]], batch_idx)

    with pytest.warns(UserWarning, match="'centres' without a graph"):
        observe(ClipR(), Slow(), steps=2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_read_after_it_was_written(estimator):
    with pytest.warns(UserWarning, match="finite differences, because buffers .*by value"):
        result = observe(ESTIMATORS[estimator](), ReadAfterwards(), steps=STEPS)
    assert relative_error(last_hypergradient(result), truth(ReadAfterwards, steps=STEPS)) < 1e-5
    with pytest.warns(UserWarning, match="miss how buffers move.*'auto'"):
        observe(ESTIMATORS[estimator](), ReadAfterwards(), steps=STEPS, derivatives="reverse")


def refuse(statistics, places):
    assert not list(places)


@pytest.mark.parametrize("kind", [Annealed, Overwritten])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "reverse"])
def test_what_does_not_carry_parameters_on_is_not_followed(kind, estimator, monkeypatch):
    make = {**ESTIMATORS, "reverse": lambda: UnrollK(STEPS, "reverse")}[estimator]
    monkeypatch.setattr(RunningStatistics, "follow", refuse)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a graph")
        result = observe(make(), kind(), steps=STEPS, every_n_steps=STEPS)
    assert last_hypergradient(result).isfinite().all()


@pytest.mark.parametrize("estimator", [T1T2, Implicit, lambda: T1T2(scale_by_lr=False)])
def test_one_step_alone_carries_nothing_on(estimator, monkeypatch):
    monkeypatch.setattr(RunningStatistics, "follow", refuse)
    observe(estimator(), Centred(), steps=2)


@pytest.mark.parametrize("kind", [*WITHOUT_GRAPH, Whitened])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.filterwarnings("ignore:.*uses finite differences")
def test_the_training_is_bit_identical(kind, estimator):
    results = []
    for own in ([], [OnlineHPOCallback(ESTIMATORS[estimator](), optimizer=frozen)]):
        model = kind()
        fit(model, own, steps=STEPS)
        results.append([*model.parameters(), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:.*uses finite differences")
def test_looking_costs_gradients_at_the_start_only(monkeypatch):
    """At two steps, two and one for each buffer, besides what any such training costs."""
    counts = []
    for steps in (1, 4):
        with monkeypatch.context() as patch:
            calls = count_calls(patch)
            observe(ClipR(math.inf), Codebook(), steps=steps)
        counts.append(calls[0])
    assert counts[0] == counts[1] == 2 * (2 + 2 + 3)


def count_calls(patch):
    calls = [0]

    def counted(*args):
        calls[0] += 1
        return gradient(*args)

    patch.setattr("lightning_hpo.step.buffers.gradient", counted)
    return calls


# ------------------------------------------------------------------------------ written later only


class LateCentred(Centred):
    """Replaces its centre, from the third step on."""

    def term(self, hidden, y):
        if self.global_step < 2:
            return self.net[2](hidden).square().mean()
        return super().term(hidden, y)


class LateCentres(ClassCentres):
    """Writes to its centres in place."""

    def term(self, hidden, y):
        if self.global_step < 2:
            return hidden.square().mean()
        return super().term(hidden, y)


class LateSecond(ClassCentres):
    """Has one from the start, and another one later."""

    def make(self):
        super().make()
        self.register_buffer("mean", torch.zeros(5))

    def term(self, hidden, y):
        first = super().term(hidden, y)
        if self.global_step < 3:
            return first
        with torch.no_grad():
            self.mean.lerp_(hidden.mean(0), 0.3)
        return first + (hidden - self.mean).square().sum(-1).mean()


class LateBesideMoments(Whitened):
    """Has running moments besides, which it writes to from the start."""

    def make(self):
        super().make()
        self.register_buffer("centre", torch.zeros(5))

    def term(self, hidden, y):
        first = super().term(hidden, y)
        if self.global_step < 3:
            return first
        first = first + (hidden - self.centre.clone()).square().sum(-1).mean()
        with torch.no_grad():
            self.centre.lerp_(hidden.mean(0), 0.3)
        return first


LATE = [LateCentred, LateCentres, LateSecond, LateBesideMoments, FilledOnce]


@functools.cache
def written_later(kind):
    return truth(kind, steps=STEPS)


@pytest.mark.parametrize("kind", LATE)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "options", [{}, {"derivatives": "finite_difference"}, {"every_n_steps": 3}]
)
@pytest.mark.filterwarnings("ignore:.*uses finite differences")
def test_what_is_first_written_later_is_followed_from_then_on(kind, estimator, options):
    if options.get("every_n_steps") and estimator == "forward":
        options = {}  # it begins anew after each update
    with pytest.warns(UserWarning, match="from this step on .*writes to the buffers") as caught:
        result = observe(ESTIMATORS[estimator](), kind(), steps=STEPS, **options)
    assert sum("from this step on" in str(w.message) for w in caught) == 1
    assert relative_error(last_hypergradient(result), written_later(kind)) < 1e-5


class Alternating(LateCentres):
    """Writes to its centres at some steps only."""

    def term(self, hidden, y):
        if self.global_step % 2:
            return hidden.square().mean()
        return ClassCentres.term(self, hidden, y)


@pytest.mark.parametrize("kind", [*LATE, Refreshed, Alternating])
@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.filterwarnings("ignore:.*(uses finite differences|from this step on)")
def test_a_training_that_is_resumed_before_or_after(kind, at, tmp_path):
    def trained(path=None, others=()):
        callback = OnlineHPOCallback(ClipR(math.inf), optimizer=frozen)
        loader = train_loader(batch_size=20)  # epochs of two steps
        fit(kind(), [callback, *others], steps=STEPS, ckpt_path=path, train=loader)
        return last_hypergradient(callback)

    path = str(tmp_path / "half.ckpt")
    trained(others=[StopAfter(at, path)])
    assert torch.equal(trained(path), trained())


@pytest.mark.filterwarnings("ignore:.*(uses finite differences|from this step on)")
def test_tangents_that_are_lost_are_named(tmp_path):
    """As from a checkpoint that does not say which buffers were followed."""
    path = str(tmp_path / "half.ckpt")
    callback = OnlineHPOCallback(ClipR(math.inf), optimizer=frozen)
    fit(Alternating(), [callback, StopAfter(5, path)], steps=STEPS)
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["callbacks"][callback.state_key]["buffers"]
    torch.save(checkpoint, path)
    callback = OnlineHPOCallback(ClipR(math.inf), optimizer=frozen)
    with pytest.warns(UserWarning, match="the buffers 'centres' of the checkpoint.* are lost"):
        fit(Alternating(), callback, steps=STEPS, ckpt_path=path)


@pytest.mark.parametrize("kind", LATE)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.filterwarnings("ignore:.*(uses finite differences|from this step on)")
def test_the_training_stays_bit_identical(kind, estimator):
    test_the_training_is_bit_identical(kind, estimator)


@pytest.mark.parametrize("kind", [LateCentred, LateCentres, LateSecond])
@pytest.mark.filterwarnings("ignore:.*without a graph")
def test_reverse_mode_says_what_it_misses_once(kind):
    with pytest.warns(UserWarning, match="as constants, because .*after the first step") as caught:
        observe(UnrollK(3, "reverse"), kind(), steps=9, every_n_steps=3)
    assert sum("after the first step" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("estimator", [T1T2, Implicit])
@pytest.mark.parametrize("kind", LATE[:2])
def test_one_step_alone_is_not_warned_about(kind, estimator):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(from this step on|after the first step)")
        observe(estimator(), kind(), steps=4)


class AnnealedLater(Annealed):
    def term(self, hidden, y):
        return super().term(hidden, y) if self.global_step > 1 else hidden.square().mean()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_later_ones_that_do_not_carry_parameters_on_are_left_alone(estimator, monkeypatch):
    monkeypatch.setattr(RunningStatistics, "follow", refuse)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(from this step on|without a graph)")
        result = observe(ESTIMATORS[estimator](), AnnealedLater(), steps=STEPS)
    assert relative_error(last_hypergradient(result), truth(AnnealedLater, steps=STEPS)) < 1e-5


class Growing(Base):
    """A bank that begins with nothing and grows."""

    since = -1

    def make(self):
        self.register_buffer("bank", torch.zeros(0, 5))

    def term(self, hidden, y):
        loss = hidden.square().mean()
        if len(self.bank):
            loss = loss + (hidden @ self.bank.T).square().mean()
        if self.global_step > self.since:
            self.bank = torch.cat([self.bank, hidden.detach()])[-20:]
        return loss


class Appearing(Growing):
    """One that is None before."""

    def make(self):
        self.register_buffer("bank", None)

    def term(self, hidden, y):
        if self.bank is None:
            self.bank = torch.zeros(0, 5)
        return super().term(hidden, y)


class GrowingLater(Growing):
    since = 2


@pytest.mark.parametrize("kind", [Growing, Appearing, GrowingLater])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "reverse"])
def test_banks_whose_shape_changes_are_named(kind, estimator):
    make = {**ESTIMATORS, "reverse": lambda: UnrollK(STEPS, "reverse")}[estimator]
    why = "(their shape|after the first step)"
    with pytest.warns(UserWarning, match=f"buffers 'bank' as constants.*{why}.*hypergradients"):
        observe(make(), kind(), steps=STEPS, every_n_steps=STEPS)
