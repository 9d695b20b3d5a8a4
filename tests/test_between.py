"""Hooks between the start of a batch and the optimizer's step, and what they change."""

import collections
import copy
import functools
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_hpo import T1T2, ClipR, L2Mixin, OnlineHPOCallback, UnrollK, named_hyperparameters
from lightning_hpo.derivatives import gradient_products
from tests.cases import (
    Mlp,
    fit,
    frozen,
    last_hypergradient,
    observe,
    relative_error,
    validation_loss,
)

FORWARD = pytest.mark.parametrize("make", [lambda: ClipR(math.inf), lambda: UnrollK(10, "forward")])
BACKENDS = pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])


def truth(make, callbacks=(), **options):
    """Central differences of the whole training over raw λ."""
    result = []
    for i, name in enumerate(named_hyperparameters(make())):
        losses = []
        for sign in (1, -1):
            model = make()
            named_hyperparameters(model)[name].raw.add_(sign * 1e-4)
            fit(model, list(callbacks), **options)
            losses.append(validation_loss(model))
        result.append((losses[0] - losses[1]) / 2e-4)
        assert i < 2
    return torch.tensor(result)


class WeightNoise(Mlp):
    """Takes the gradient at θ plus noise, and steps from θ."""

    def on_train_batch_start(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(self.global_step)
        self.kept = [p.detach().clone() for p in self.parameters()]
        for p in self.parameters():
            p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.05)

    def on_before_optimizer_step(self, optimizer):
        for p, value in zip(self.parameters(), self.kept, strict=True):
            p.data.copy_(value)
        super().on_before_optimizer_step(optimizer)


class Schedule:
    def __init__(self):
        self.factor = 1.0

    def __call__(self):
        return self.factor


class Scheduled(Mlp):
    """Keeps a schedule outside of the module tree, and moves it on after the forward pass."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.factor = Schedule().__call__

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factor()

    def on_before_zero_grad(self, optimizer):
        self.factor.__self__.factor *= 0.9


class LateNoise(pl.Callback):
    """The same as WeightNoise in the hooks of another callback."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        WeightNoise.on_train_batch_start(module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for p, value in zip(module.parameters(), module.kept, strict=True):
            p.data.copy_(value)


@FORWARD
@BACKENDS
@pytest.mark.parametrize("kind", [WeightNoise, Scheduled])
def test_what_changes_before_the_step(kind, derivatives, make):
    found = last_hypergradient(observe(make(), kind("momentum"), derivatives=derivatives))
    assert relative_error(found, truth(lambda: kind("momentum"))) < 1e-5


class Annealed(Mlp):
    """Writes to a parameter that is not trained."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.temperature = nn.Parameter(torch.ones(()), requires_grad=False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.temperature.mul_(0.8)
        return super().training_step(batch, batch_idx) * self.temperature


class AnnealedBackbone(Annealed):
    """Small beside what else is frozen."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.backbone = nn.Parameter(torch.zeros(20_000), requires_grad=False)


class Teacher(Mlp):
    """Follows a moving average that requires grad, and that no optimizer moves."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.teacher = copy.deepcopy(self.net)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for slow, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(p.detach(), 0.1)
        size = sum(p.detach().square().sum() for p in self.teacher.parameters())
        return super().training_step(batch, batch_idx) * size

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)


class OwnState(Mlp):
    """Makes an attribute, a buffer and the contents of a tuple in the course of a step."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_buffer("count", None)
        self.pair = (torch.ones(()), [1.0])

    def on_train_batch_start(self, batch, batch_idx):
        self.count = None
        vars(self).pop("seen", None)

    def training_step(self, batch, batch_idx):
        factor = 0.3 if hasattr(self, "seen") or self.count is not None else 1.0
        self.seen, self.count = True, torch.ones(())
        self.pair[0].mul_(0.9)
        return super().training_step(batch, batch_idx) * factor * self.pair[0]


class AnnealedLater(Annealed):
    """In a way that torch does not count."""

    def training_step(self, batch, batch_idx):
        if self.global_step >= 4:
            self.temperature.data.mul_(0.8)
        return Mlp.training_step(self, batch, batch_idx) * self.temperature


class Exchanges(Mlp):
    """Exchanges functions and modules, once."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.criterion = F.cross_entropy

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.criterion(self.net(x), y)
        if self.criterion is F.cross_entropy:
            self.criterion = functools.partial(F.cross_entropy, label_smoothing=0.3)
        else:
            self.criterion = lambda *a: F.cross_entropy(*a, label_smoothing=0.1)
        return loss


class Registers(Mlp):
    """Registers a buffer where there was none, and deletes another."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.register_buffer("early", torch.tensor(2.0))

    def training_step(self, batch, batch_idx):
        factor = self.early if hasattr(self, "early") else 1.0
        if hasattr(self, "early"):
            del self.early
        if "late" not in dict(self.net.named_buffers()):
            self.net.register_buffer("late", torch.tensor(0.5))
            factor = factor * 3.0
        return super().training_step(batch, batch_idx) * factor


class Counter:
    def __init__(self):
        self.factor = 1.0

    def __call__(self):
        self.factor *= 0.9
        return self.factor


class Objects(Mlp):
    """Keeps state in an object that can be called, and in a named tuple."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.counter = Counter()
        self.pair = collections.namedtuple("Pair", "a b")(torch.ones(()), [1.0])

    def training_step(self, batch, batch_idx):
        self.pair.a.mul_(0.9)
        self.pair.b[0] *= 0.95
        factor = self.counter() * self.pair.a * self.pair.b[0]
        return super().training_step(batch, batch_idx) * factor


WRITING = [Annealed, AnnealedBackbone, AnnealedLater, OwnState, Exchanges, Registers, Objects]


@pytest.mark.parametrize("kind", WRITING)
@pytest.mark.parametrize(
    "make", [lambda: ClipR(math.inf), lambda: UnrollK(10, "forward"), lambda: UnrollK(10)]
)
@BACKENDS
def test_what_a_step_writes_besides(kind, make, derivatives):
    """A replay starts from what was there before."""
    found = last_hypergradient(observe(make(), kind("momentum"), derivatives=derivatives))
    assert relative_error(found, truth(lambda: kind("momentum"))) < 1e-5


class Lazy(Mlp):
    """Makes a part of itself when it is first needed, and draws its weights then."""

    def training_step(self, batch, batch_idx):
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(4, 4)
        x, y = batch
        return super().training_step((x + self.extra(x), y), batch_idx)


@pytest.mark.parametrize("kind", [*WRITING, Teacher, Lazy])
@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(2, "reverse")])
def test_what_a_step_writes_is_written_once(kind, make):
    observed, alone = kind("momentum"), kind("momentum")
    torch.manual_seed(0)
    observe(make(), observed)
    torch.manual_seed(0)
    fit(alone)
    states = observed.state_dict(), alone.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), name


class ChangesInBackward(Mlp):
    """A change between forward pass and step that no hook of Lightning shows."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.factor = Schedule().__call__

    def on_train_batch_start(self, batch, batch_idx):
        self.factor.__self__.factor = 1.0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * self.factor()
        if "log" not in vars(self):  # a replay is not the training
            loss.register_hook(lambda g: setattr(self.factor.__self__, "factor", 0.5))
        return loss


@BACKENDS
def test_a_replay_that_is_seen_to_come_too_late(derivatives):
    """The first step shows it; from then on steps are replayed at their batches."""
    callback = observe(ClipR(math.inf), ChangesInBackward("momentum"), derivatives=derivatives)
    expected = truth(lambda: ChangesInBackward("momentum"))
    assert relative_error(last_hypergradient(callback), expected) < 1e-5


class ChangesLater(ChangesInBackward):
    def training_step(self, batch, batch_idx):
        if self.global_step >= 3:
            return super().training_step(batch, batch_idx)
        return Mlp.training_step(self, batch, batch_idx)


@BACKENDS
def test_a_resumed_training_compares_no_more_than_the_whole_one(derivatives, tmp_path):
    """The first comparison comes too early to see the change, and the next much later."""
    path = tmp_path / "last.ckpt"

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.global_step == 5:
                trainer.save_checkpoint(path)

    whole, resumed = (
        OnlineHPOCallback(ClipR(math.inf), optimizer=frozen, derivatives=derivatives)
        for _ in range(2)
    )
    fit(ChangesLater("momentum"), [whole, Save()])
    fit(ChangesLater("momentum"), resumed, ckpt_path=str(path))
    assert list(whole.history) == list(resumed.history)


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_train_batch_end"])
def test_a_module_may_be_copied_in_a_hook(hook):
    copies = []
    other = pl.Callback()
    setattr(other, hook, lambda trainer, module, *_: copies.append(copy.deepcopy(module)))
    callback = OnlineHPOCallback(ClipR(), optimizer=frozen)
    fit(Mlp("momentum"), [callback, other], steps=3, gradient_clip_val=0.01)
    model = copies[0]
    fit(model)
    fit(model, OnlineHPOCallback(ClipR(), optimizer=frozen), gradient_clip_val=0.01)
    assert not {"on_train_batch_start", "configure_gradient_clipping"} & vars(model).keys()


class Patched(pl.Callback):
    """Hooks that hide: on parameters, and wrapped ones on a callback itself."""

    def __init__(self, where):
        self.where = where

    def on_train_start(self, trainer, module):
        @functools.wraps(self.on_before_optimizer_step)
        def late(trainer, module, optimizer):
            self.put_back(module)

        if self.where == "callback":
            self.on_before_optimizer_step = late
        for p in module.parameters() if self.where == "parameter" else ():
            p.register_post_accumulate_grad_hook(lambda _, module=module: self.put_back(module))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        WeightNoise.on_train_batch_start(module, batch, batch_idx)

    def put_back(self, module):
        with torch.no_grad():
            for p, value in zip(module.parameters(), module.kept, strict=True):
                p.data.copy_(value)


@BACKENDS
@pytest.mark.parametrize("where", ["callback", "parameter"])
def test_hooks_that_hide(where, derivatives):
    expected = observe(ClipR(math.inf), WeightNoise("momentum"))
    callback = OnlineHPOCallback(ClipR(math.inf), optimizer=frozen, derivatives=derivatives)
    fit(Mlp("momentum"), [Patched(where), callback])
    assert relative_error(last_hypergradient(callback), last_hypergradient(expected)) < 1e-6


class Callable:
    def __call__(self, *args):
        pass


def test_a_hook_may_be_any_callable():
    model = Mlp("momentum")
    model.on_after_backward = Callable()
    callback = OnlineHPOCallback(ClipR(math.inf), optimizer=frozen)
    fit(model, [pl.callbacks.LambdaCallback(on_before_zero_grad=Callable()), callback])
    expected = observe(ClipR(math.inf), Mlp("momentum"))
    assert relative_error(last_hypergradient(callback), last_hypergradient(expected)) < 1e-10


class NoisyGradient(Mlp):
    """Adds to the gradient right before it is clipped."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        for p in self.parameters():
            p.grad.add_(0.05)


class ChangingThreshold(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        trainer.gradient_clip_val = 0.3 if trainer.global_step < 4 else 0.1


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize(
    ("kind", "others"), [(NoisyGradient, []), (Mlp, [ChangingThreshold()])], ids=["hook", "value"]
)
def test_what_changes_before_clipping(kind, others, algorithm):
    options = {"gradient_clip_val": 0.3, "gradient_clip_algorithm": algorithm}
    callback = OnlineHPOCallback(ClipR(math.inf), optimizer=frozen)
    fit(kind("momentum"), [*others, callback], **options)
    expected = truth(lambda: kind("momentum"), others, **options)
    assert relative_error(last_hypergradient(callback), expected) < 1e-5
    assert relative_error(truth(lambda: Mlp("momentum"), **options), expected) > 0.01


@BACKENDS
def test_what_another_callback_changes_before_the_step(derivatives):
    expected = observe(ClipR(math.inf), WeightNoise("momentum"))
    callback = OnlineHPOCallback(ClipR(math.inf), optimizer=frozen, derivatives=derivatives)
    fit(Mlp("momentum"), [LateNoise(), callback])
    assert relative_error(last_hypergradient(callback), last_hypergradient(expected)) < 1e-6


class Clamped(Mlp):
    """A hook that is not linear sees the gradient itself, not a multiple of it."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        for p in self.parameters():
            p.register_hook(lambda g: g.clamp(-0.1, 0.1))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(
    ("make", "derivatives"),
    [
        (lambda: ClipR(math.inf), "finite_difference"),
        (lambda: UnrollK(10, "reverse"), "reverse"),
    ],
)
def test_hooks_of_parameters(make, derivatives, accumulated):
    """They are a part of the training, and have no business with L_V or second derivatives.

    With them the derivative of the gradient is not symmetric: differences multiply with it, which
    forward estimators need; double backward with its transpose, which reverse ones need.
    """
    options = {"accumulate_grad_batches": accumulated}
    found = observe(make(), Clamped("momentum"), derivatives=derivatives, **options)
    expected = truth(lambda: Clamped("momentum"), **options)
    assert relative_error(last_hypergradient(found), expected) < 1e-4
    plain = truth(lambda: Mlp("momentum"), **options)
    assert relative_error(plain, last_hypergradient(found)) > 0.05


class Quantizer(torch.autograd.Function):
    """Passes gradients straight through, and none to the scale."""

    @staticmethod
    def forward(ctx, x, scale):
        return torch.round(x / scale) * scale

    @staticmethod
    def backward(ctx, g):
        return g, None


class Quantized(Mlp):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def loss(self, batch):
        x, y = batch
        return super().loss((Quantizer.apply(x * 1.0, self.scale), y))


@pytest.mark.parametrize(
    "make", [T1T2, lambda: T1T2(scale_by_lr=False), ClipR, lambda: UnrollK(2, "forward")]
)
def test_a_backward_without_a_gradient(make):
    found = observe(make(), Quantized("momentum"))
    assert len(found.history) > 0
    assert last_hypergradient(found).abs().min() > 0
    p = nn.Parameter(torch.ones(2))
    loss = Quantizer.apply(torch.ones(3, requires_grad=True), p.sum()).sum()
    assert gradient_products(loss, [p], [torch.ones(1, 2)]) == [None]


class Half(torch.autograd.Function):
    """½‖w‖², whose backward returns w itself: so does its product with the Hessian."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return 0.5 * (w * w).sum()

    @staticmethod
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        return w


class Decaying(Mlp):
    def training_step(self, batch, batch_idx):
        return sum(Half.apply(p) for p in self.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_a_product_that_is_its_direction(optimizer, granularity):
    def make():
        return Decaying(optimizer, granularity=granularity)

    found = last_hypergradient(observe(ClipR(math.inf), make(), derivatives="reverse"))
    assert relative_error(found, truth(make)) < 1e-5


class JoinsWithin(pl.Callback):
    """Adds a parameter between the micro-batches of a step, or between its batch and the step."""

    def __init__(self, hook):
        self.join = Joins().on_train_batch_end
        setattr(self, hook, self.join_once)

    def join_once(self, trainer, module, *_):
        if not hasattr(module, "extra"):
            self.join(trainer, module, None, None, 0)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize(
    ("hook", "accumulated"), [("on_train_batch_end", 2), ("on_before_zero_grad", 1)]
)
@BACKENDS
def test_parameters_that_join_within_a_step(optimizer, hook, accumulated, derivatives):
    runs = []
    for other in (JoinsWithin(hook), pl.Callback()):
        callback = OnlineHPOCallback(ClipR(), optimizer=frozen, derivatives=derivatives)
        fit(
            Mlp(optimizer, schedule=False),
            [other, callback],
            steps=4,
            accumulate_grad_batches=accumulated,
        )
        runs.append(last_hypergradient(callback))
    assert relative_error(*runs) < 1e-6


class Freezing(Mlp):
    """Freezes a layer in every other step, within the step."""

    def training_step(self, batch, batch_idx):
        self.net[0].requires_grad_(self.global_step % 2 == 0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", [T1T2, lambda: UnrollK(3, "reverse")])
def test_a_step_that_freezes_a_layer(make):
    """Exact products are those of differences.

    (Tangents differ in the step that freezes: differences see that the rest depends on the layer.)
    """
    results = []
    for derivatives in ("reverse", "finite_difference"):
        model = Freezing("momentum", inside_loss=True)
        callback = observe(make(), model, derivatives=derivatives, accumulate_grad_batches=2)
        results.append(last_hypergradient(callback))
    assert relative_error(*results) < 1e-5
    tangents = observe(ClipR(), Freezing("momentum"), accumulate_grad_batches=2)
    assert last_hypergradient(tangents).isfinite().all()


class Joins(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            extra = nn.Parameter(torch.zeros(2))
            module.register_parameter("extra", extra)
            trainer.optimizers[0].add_param_group({"params": [extra]})


@pytest.mark.parametrize("make", [T1T2, ClipR, lambda: UnrollK(2, "forward")])
def test_parameters_that_join_between_step_and_update(make):
    """They are not yet affected by λ, and do not get in the way."""
    runs = []
    for other in (Joins(), pl.Callback()):
        callback = OnlineHPOCallback(make(), optimizer=frozen)
        fit(Mlp("momentum", schedule=False), [other, callback], steps=4)
        runs.append(last_hypergradient(callback))
    assert torch.equal(*runs)


class Transposed(L2Mixin, pl.LightningModule):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(
            torch.randn(6, 4).T if kind else torch.randn(6, 4).T.contiguous()
        )
        self.register_l2(0.05)

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.weight).tanh().square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("make", [T1T2, ClipR])
def test_parameters_that_are_not_contiguous(make, monkeypatch):
    """They stay whole: flattening them block by block would copy them as often."""
    from lightning_hpo.dynamics import OptimizerStep, base

    monkeypatch.setattr(base, "BLOCK", 3)
    blocks = []
    restricted = OptimizerStep.restricted
    monkeypatch.setattr(
        OptimizerStep, "restricted", lambda self, b: blocks.append(b) or restricted(self, b)
    )
    plain = last_hypergradient(observe(make(), Transposed(False), steps=3))
    assert len(blocks) == 3 * 8
    blocks.clear()
    found = last_hypergradient(observe(make(), Transposed(True), steps=3))
    assert len(blocks) == 3
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
