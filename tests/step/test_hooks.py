"""Hooks between the start of a batch and the optimizer's step, and what they change."""

import copy
import functools
import math

import lightning.pytorch as pl
import pytest
import torch
from cases import Mlp, fit, frozen, last_hypergradient, observe, relative_error, truth

from lightning_hpo import ClipR, OnlineHPOCallback, UnrollK

FORWARD = pytest.mark.parametrize("make", [lambda: ClipR(math.inf), lambda: UnrollK(10, "forward")])
BACKENDS = pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])


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


class HalvesInside(Mlp):
    """A hook on a module."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net[1].register_full_backward_hook(lambda m, inner, outer: (0.5 * inner[0],))


class ScalesBefore(Mlp):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net[2].register_full_backward_pre_hook(lambda m, outer: (2 * outer[0],))


@pytest.mark.parametrize("kind", [HalvesInside, ScalesBefore])
def test_hooks_of_modules_have_no_business_with_the_validation_loss(kind):
    """Tangents follow them by differences; none acts on L_V."""
    callback = observe(ClipR(math.inf), kind("momentum"), derivatives="finite_difference")
    expected = truth(lambda: kind("momentum"))
    assert relative_error(last_hypergradient(callback), expected) < 1e-5
    assert relative_error(truth(lambda: Mlp("momentum")), expected) > 0.05
