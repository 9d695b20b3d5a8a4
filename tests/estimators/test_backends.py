"""The backends under the callback, and what ``derivatives="auto"`` stands for."""

import itertools
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import (
    TRAIN,
    VALID,
    Mlp,
    OnceTanh,
    fit,
    flat,
    last_hypergradient,
    observe,
    relative_error,
    valid_loader,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import lightning_hpo.step.replay_check as replay_check
from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    Hyperparameter,
    Interval,
    L2Mixin,
    UnrollK,
    named_hyperparameters,
)
from lightning_hpo.derivatives import FiniteDifference, finite_difference


class OnceTanhLayer(nn.Module):
    def forward(self, x):
        return OnceTanh.apply(x)


class FlashAttention(nn.Module):
    """Attention over the hidden units, on a kernel that the module itself insists on."""

    kernel = SDPBackend.FLASH_ATTENTION

    def forward(self, x):
        q = torch.stack([x, x.sin()], dim=-1).unsqueeze(1)
        with sdpa_kernel(self.kernel):
            return F.scaled_dot_product_attention(q, q, q)[:, 0, :, 0]


class MathAttention(FlashAttention):
    kernel = SDPBackend.MATH


# Models without a double backward, and their twins that have one.
NO_DOUBLE_BACKWARD = pytest.mark.parametrize(
    ("activation", "twin"),
    [(OnceTanhLayer, nn.Tanh), (FlashAttention, MathAttention)],
    ids=["once_differentiable", "attention"],
)


def hypergradients(estimator, model, derivatives):
    history = observe(estimator, model, steps=5, derivatives=derivatives).history
    return torch.stack([torch.stack(list(r.hypergradients.values())) for r in history])


@pytest.mark.parametrize("make", [lambda: ClipR(radius=5.0), lambda: UnrollK(5, "reverse")])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("inside_loss", [False, True], ids=["gradient", "loss"])
def test_the_backends_agree(make, optimizer, inside_loss):
    reverse, forward, difference, auto = (
        hypergradients(make(), Mlp(optimizer, inside_loss=inside_loss), derivatives)
        for derivatives in ("reverse", "forward", "finite_difference", "auto")
    )
    assert relative_error(forward, reverse) < 1e-10
    assert torch.equal(auto, reverse)
    assert 0 < relative_error(difference, reverse) < 1e-4


@NO_DOUBLE_BACKWARD
@pytest.mark.parametrize("make", [lambda: ClipR(radius=5.0), lambda: UnrollK(5, "reverse")])
def test_auto_falls_back_to_finite_differences_and_says_so_once(activation, twin, make):
    truth = hypergradients(make(), Mlp("momentum", activation=twin), "reverse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = hypergradients(make(), Mlp("momentum", activation=activation), "auto")
    said = [w for w in caught if "uses finite differences" in str(w.message)]
    assert relative_error(result, truth) < 1e-4
    assert len(said) == 1
    assert "double backward" in str(said[0].message)


@NO_DOUBLE_BACKWARD
@pytest.mark.parametrize("derivatives", ["reverse", "forward"])
def test_an_explicit_backend_is_not_replaced_silently(activation, twin, derivatives):
    with pytest.raises(RuntimeError, match=rf"(?s)'{derivatives}'\).*Use derivatives='auto'"):
        hypergradients(ClipR(), Mlp(activation=activation), derivatives)


def test_auto_does_not_hide_errors_of_the_users():
    class Broken(Mlp):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("the user's own")
            return super().training_step(batch, batch_idx)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match=r"^the user's own$"):
            hypergradients(ClipR(), Broken(), "auto")
    assert not [w for w in caught if "finite differences" in str(w.message)]


def test_training_under_finite_differences_is_bit_identical():
    """θ is put back by copy; adding and subtracting the same number would not restore it."""
    trained = []
    for derivatives in ("finite_difference", "reverse"):
        model = Mlp("adam", inside_loss=True)
        observe(ClipR(), model, derivatives=derivatives, valid=valid_loader())
        trained.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


class Summed(Mlp):
    """Autograd returns one tensor as the gradient of both biases."""

    def __init__(self):
        super().__init__("momentum", inside_loss=True)
        self.first = nn.Parameter(torch.full((3,), 0.1))
        self.second = nn.Parameter(torch.full((3,), 0.2))

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x) + (self.first + self.second), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("derivatives", ["reverse", "forward", "finite_difference"])
@pytest.mark.parametrize(
    "make",
    [T1T2, lambda: UnrollK(2, "reverse"), lambda: UnrollK(2, "forward"), lambda: ClipR(math.inf)],
    ids=["T1T2", "reverse", "forward", "ClipR"],
)
def test_gradients_that_share_their_memory(make, derivatives):
    """Against the same model with one bias of twice the learning rate."""

    class Single(Summed):
        def __init__(self):
            super().__init__()
            del self.first, self.second
            self.both = nn.Parameter(torch.full((3,), 0.3))

        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self.net(x) + self.both, y)

        def configure_optimizers(self):
            groups = [{"params": self.net.parameters()}, {"params": [self.both], "lr": 0.2}]
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    shared = observe(make(), Summed(), derivatives=derivatives, steps=6)
    truth = observe(make(), Single(), steps=6)
    error = relative_error(last_hypergradient(shared), last_hypergradient(truth))
    assert error < (1e-6 if derivatives == "finite_difference" else 1e-10)


# --------------------------------------------------------------------------- one-sided differences


def count_gradients(monkeypatch):
    """Counts the gradients that differences take."""
    counts = []
    original = finite_difference._displaced_gradient

    def counted(*args):
        counts.append(args)
        return original(*args)

    monkeypatch.setattr(finite_difference, "_displaced_gradient", counted)
    return counts


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("inside_loss", [False, True])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_differences_reuse_the_gradient_of_the_step(optimizer, inside_loss, clip, monkeypatch):
    """One gradient per direction from the second step on, before penalties and clipping."""
    counts = count_gradients(monkeypatch)
    options = {"steps": 6, "gradient_clip_val": clip}
    model = Mlp(optimizer, inside_loss=inside_loss)
    found = observe(ClipR(math.inf), model, derivatives="finite_difference", **options)
    truth = observe(ClipR(math.inf), Mlp(optimizer, inside_loss=inside_loss), **options)
    assert relative_error(last_hypergradient(found), last_hypergradient(truth)) < 1e-6
    # Two λ. In the loss they are displaced by central differences at every step.
    assert len(counts) == (4 * 6 if inside_loss else 0) + 5 * 2


class Changes(Mlp):
    """Something changes gradients by little, from some step on."""

    start = 0

    def change(self):
        if self.trainer.global_step >= self.start:
            for p in self.parameters():
                p.grad *= 1 + 1e-4


class Hooked(Changes):
    def on_after_backward(self):
        self.change()


class OwnBackward(Changes):
    def backward(self, *args, **kwargs):
        super().backward(*args, **kwargs)
        self.change()


class HookedParameters(Changes):
    def configure_optimizers(self):
        self.hook()
        return super().configure_optimizers()

    def hook(self):
        for p in self.parameters():
            p.register_post_accumulate_grad_hook(self.change_one)

    def change_one(self, p):
        if self.trainer.global_step >= self.start:
            p.grad *= 1 + 1e-4


class HookedLate(HookedParameters):
    """Comes with the second epoch."""

    def configure_optimizers(self):
        return Mlp.configure_optimizers(self)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.hook()


class KeepsGradients(Changes):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        for p in self.parameters():
            if p.grad is not None:
                p.grad *= 1e-4 if self.trainer.global_step > self.start else 0


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize(
    "kind", [Hooked, OwnBackward, HookedParameters, HookedLate, KeepsGradients]
)
def test_a_gradient_that_hooks_may_change_is_not_reused(kind, start, monkeypatch):
    """A difference would see 1e-4 of the gradient divided by √ε; central ones do not."""
    counts = count_gradients(monkeypatch)
    model = kind("momentum")
    model.start = start
    found = observe(ClipR(5.0, decay=0.5), model, derivatives="finite_difference", steps=10)
    model = kind("momentum")
    model.start = start
    truth = observe(ClipR(5.0, decay=0.5), model, steps=10)
    error = relative_error(last_hypergradient(found), last_hypergradient(truth))
    assert error < 1e-6
    # Two directions, none at the first step; the one that comes late is seen at step 6 (of 10).
    assert len(counts) == (2 * (4 + 2 * 5) if kind is HookedLate else 2 * 2 * 9)


class ChangesLate(Mlp):
    """Sees the gradient after the callback has."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        for p in self.parameters():
            p.grad *= 1.5


class HookedOptimizer(Mlp):
    def configure_optimizers(self):
        configured = super().configure_optimizers()

        def change(optimizer, args, kwargs):
            def changed():
                result = kwargs["closure"]()
                for p in self.parameters():
                    p.grad *= 1.5
                return result

            return args, {**kwargs, "closure": changed}

        configured["optimizer"].register_step_pre_hook(change)
        return configured


@pytest.mark.parametrize("kind", [ChangesLate, HookedOptimizer])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_gradient_that_late_hooks_change_is_not_reused(kind, clip, monkeypatch):
    counts = count_gradients(monkeypatch)
    options = {"steps": 6, "gradient_clip_val": clip}
    found = observe(ClipR(5.0), kind("momentum"), derivatives="finite_difference", **options)
    assert len(counts) == 2 * 2 * 5  # central ones, in two directions, but at the first step
    truth = observe(ClipR(5.0), kind("momentum"), **options)
    plain = observe(ClipR(5.0), Mlp("momentum"), **options)
    assert relative_error(last_hypergradient(found), last_hypergradient(truth)) < 1e-6
    if kind is not ChangesLate or clip is None:  # clipping to a norm undoes a factor
        assert relative_error(last_hypergradient(plain), last_hypergradient(truth)) > 1e-3


class Scaled(Mlp):
    """From step 4 on, a replay does not give the gradient of the step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        real = "log" not in vars(self)  # a replay cannot know
        return loss * (1 + 1e-9) if real and self.global_step >= 4 else loss


def test_a_gradient_that_differs_is_not_reused(monkeypatch):
    """Unseen by the look at hooks: found at the next comparison, whose step takes central ones."""
    monkeypatch.setattr(replay_check, "EVERY", 4)
    counts = count_gradients(monkeypatch)
    found = observe(ClipR(5.0), Scaled("momentum"), derivatives="finite_difference", steps=10)
    truth = observe(ClipR(5.0), Mlp("momentum"), steps=10)
    assert relative_error(last_hypergradient(found), last_hypergradient(truth)) < 1e-6
    assert len(counts) == 2 * 3 + 4 * 6


def test_gradients_are_compared_where_few_steps_are_seen(monkeypatch):
    """Only every other step is looked at; the comparison falls on one of them."""
    monkeypatch.setattr(replay_check, "EVERY", 4)
    counts = count_gradients(monkeypatch)
    observe(ClipR(5.0, stride=2), Scaled("momentum"), derivatives="finite_difference", steps=10)
    # Two directions, none at step 2. Step 4 reuses the gradient; that of step 6 is compared first.
    assert len(counts) == 2 * (1 + 2 + 2 + 2)


@pytest.mark.parametrize("make", [lambda: ClipR(math.inf), lambda: UnrollK(3, "forward")])
def test_differences_where_a_step_has_no_loss(make):
    class Skips(Mlp):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 3 else super().training_step(batch, batch_idx)

    found = observe(make(), Skips("momentum"), derivatives="finite_difference", steps=10)
    truth = observe(make(), Skips("momentum"), steps=10)
    assert relative_error(last_hypergradient(found), last_hypergradient(truth)) < 1e-6


def test_one_sided_differences_are_products():
    a = torch.randn(3, 3)
    matrix = a @ a.T

    def loss(theta, lam):
        return 0.5 * theta[0] @ matrix @ theta[0] + theta[0].sum()

    theta = [torch.randn(3).requires_grad_()]
    u = [torch.randn(2, 3)]
    before = theta[0].detach().clone()
    (gradient,) = torch.autograd.grad(loss(theta, []), theta)
    (product,), weights = FiniteDifference().one_sided(loss, theta, [], u)
    product = product - weights[:, None] * gradient
    torch.testing.assert_close(product, u[0] @ matrix, rtol=1e-6, atol=1e-6)
    assert torch.equal(theta[0].detach(), before)


class Postpones(Mlp):
    """Makes a step at every second batch only."""

    count = 0

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        self.count += 1
        if self.count % 2 == self.first:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        else:
            closure()


@pytest.mark.parametrize("first", [0, 1])
def test_a_batch_without_a_step_leaves_nothing_behind(first, monkeypatch):
    monkeypatch.setattr(replay_check, "EVERY", 3)
    runs = []
    for derivatives in ("finite_difference", "reverse"):
        model = Postpones("sgd", schedule=False)
        model.first = first
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*differs from that of a replay.*")
            callback = observe(ClipR(math.inf), model, derivatives=derivatives, steps=12)
        runs.append(torch.stack([flat(r.hypergradients.values()) for r in callback.history]))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("inside_loss", [False, True])
@pytest.mark.parametrize("init", [1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_along_small_strengths(dtype, init, inside_loss):
    """In float32, a strength that does little inside the loss is not lost to rounding."""
    runs = []
    for derivatives in ("finite_difference", "reverse"):
        model = Mlp("sgd", inside_loss=inside_loss, init=init, granularity="model").float()
        for h in named_hyperparameters(model).values():
            h.to(dtype)
        loaders = {
            name: DataLoader(TensorDataset(x.float(), y), batch_size=size)
            for name, (x, y), size in (("train", TRAIN, 8), ("valid", VALID, 20))
        }
        callback = observe(ClipR(math.inf), model, derivatives=derivatives, **loaders)
        runs.append(torch.stack([flat(r.hypergradients.values()) for r in callback.history]))
    # Rounding of the whole gradient, 1e-7, over an effect of the size of λ.
    assert relative_error(*runs) < (0.1 if init == 1e-6 and inside_loss else 5e-3)


# ---------------------------------------------------------------------- gradients that share memory


class Temperature(Mlp):
    """A value on its own scale, near the end of its interval."""

    def __init__(self, init):
        super().__init__("sgd")
        self.temperature = Hyperparameter(init, Interval(init / 2, 5.0))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(0.1 * self.net(x) / self.temperature(), y)


@pytest.mark.parametrize("init", [0.02, 0.1, 1.0])
def test_differences_along_small_values(init):
    runs = []
    for derivatives in ("finite_difference", "reverse"):
        loaders = {
            name: DataLoader(TensorDataset(x.float(), y), batch_size=size)
            for name, (x, y), size in (("train", TRAIN, 8), ("valid", VALID, 20))
        }
        model = Temperature(init).float()
        runs.append(last_hypergradient(observe(T1T2(), model, derivatives=derivatives, **loaders)))
    assert relative_error(*runs) < 0.02


class Assembled(L2Mixin, pl.LightningModule):
    """Autograd returns overlapping parts of one tensor as the gradients of three parameters."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.whole, self.first, self.second = (
            nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 1, 2)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lin = nn.Linear(4, 3)
        self.scale = Hyperparameter(0.5)
        self.register_l2(0.05, parameters=["whole", "first", "second"])

    join = staticmethod(torch.cat)

    def loss(self, batch):
        x, y = batch
        z = self.join([self.first, self.second]) + self.whole
        return F.cross_entropy(self.lin(x).tanh() + self.scale() * z.tanh(), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        z = self.join([self.first, self.second]) + self.whole
        return F.cross_entropy(self.lin(x).tanh() + 0.5 * z.tanh(), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Expanded(Assembled):
    """The gradient of a sum is an expanded part of another."""

    def __init__(self):
        super().__init__()
        self.second = nn.Parameter(torch.stack([self.second.detach()] * 2) / 2)
        self.first = nn.Parameter(self.first.detach()[None].expand(3, 1).clone() / 3)

    @staticmethod
    def join(parts):
        return torch.cat([part.sum(0) for part in parts])


def assembled_truth(kind, steps):
    """Central differences of whole trainings."""
    start = [h.raw.item() for h in named_hyperparameters(kind()).values()]
    result = []
    for i in range(len(start)):
        ends = []
        for sign in (1, -1):
            model = kind()
            for j, h in enumerate(named_hyperparameters(model).values()):
                h.raw.fill_(start[j] + sign * 1e-5 * (i == j))
            fit(model, steps=steps)
            with torch.no_grad():
                ends.append(model.validation_step(VALID, 0).item())
        result.append((ends[0] - ends[1]) / 2e-5)
    return torch.tensor(result)


@pytest.mark.parametrize("derivatives", ["reverse", "forward", "finite_difference"])
@pytest.mark.parametrize("kind", [Assembled, Expanded])
@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (T1T2, 1),
        (lambda: UnrollK(3, "reverse"), 3),
        (lambda: UnrollK(3, "forward"), 3),
        (lambda: ClipR(math.inf), 3),
    ],
    ids=["T1T2", "reverse", "forward", "RTHO"],
)
def test_gradients_that_overlap_in_memory(make, steps, kind, derivatives):
    callback = observe(make(), kind(), derivatives=derivatives, steps=steps)
    assert relative_error(last_hypergradient(callback), assembled_truth(kind, steps)) < 1e-5


class DroppedOut(DropoutMixin, Assembled):
    """λ that are differenced, beside overlapping gradients."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Sequential(nn.Dropout(0.3), self.lin)
        self.register_dropout()


def test_gradients_that_overlap_beside_differences():
    runs = []
    for mode, d in (("forward", "reverse"), ("reverse", "reverse"), ("forward", "forward")):
        torch.manual_seed(0)
        callback = observe(UnrollK(3, mode), DroppedOut(), derivatives=d, steps=3)
        runs.append(last_hypergradient(callback))
    for run in runs[1:]:
        assert relative_error(run, runs[0]) < 1e-9


OUTSIDE = itertools.count()


class Outside(Mlp):
    """Depends on something of which no replay knows."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (1 + next(OUTSIDE) % 7)


@pytest.mark.parametrize("derivatives", ["auto", "reverse", "forward"])
def test_a_step_that_no_replay_repeats_is_named(derivatives):
    """Nothing is compiled, and no other backend would help."""
    with pytest.warns(UserWarning, match="two replays") as caught:
        observe(ClipR(), Outside(), derivatives=derivatives)
    texts = [str(w.message) for w in caught if "OnlineHPOCallback" in str(w.message)]
    said = [text for text in texts if "two replays of the same training_step" in text]
    assert len(said) == 1
    assert "random numbers of its own" in said[0]
    assert "state outside of the module" in said[0]
    assert not any("compile" in text or "finite differences" in text for text in texts)
