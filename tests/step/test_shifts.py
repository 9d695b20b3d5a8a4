"""What moves θ between the steps of the optimizer is noticed, and has a remedy."""

import copy
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from cases import Mlp, fit, frozen, last_hypergradient, observe, relative_error, truth

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK

WARNING = "something else than the optimizer moves the trained parameters 'net.0.weight'"
FOLLOWS = {"ClipR": lambda: ClipR(math.inf), "reverse": lambda: UnrollK(10, "reverse")}


def clamp(model):
    for p in model.net.parameters():
        p.data.clamp_(-0.3, 0.3)


class AtTheEnd(Mlp):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        clamp(self)


class AtTheStart(Mlp):
    def on_train_batch_start(self, batch, batch_idx):
        clamp(self)


class AfterTheStep(Mlp):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        clamp(self)


class InAHook(Mlp):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        optimizer.register_step_post_hook(lambda *_: clamp(self))
        return optimizer


class SlowWeights(pl.Callback):
    """Lookahead (Zhang et al. 2019) as a callback: every third step is averaged."""

    def on_fit_start(self, trainer, module):
        self.slow = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step % 3 == 0:
            for slow, p in zip(self.slow, module.parameters(), strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


@pytest.mark.parametrize("estimator", FOLLOWS)
@pytest.mark.parametrize("kind", [AtTheEnd, AtTheStart, AfterTheStep, InAHook])
def test_a_projection_outside_of_the_step_is_warned_about(kind, estimator):
    with pytest.warns(UserWarning, match=WARNING) as caught:
        observe(FOLLOWS[estimator](), kind())
    assert len([w for w in caught if "something else" in str(w.message)]) == 1


@pytest.mark.parametrize("estimator", FOLLOWS)
def test_an_average_in_a_callback_is_warned_about(estimator):
    callback = OnlineHPOCallback(FOLLOWS[estimator](), optimizer=frozen)
    with pytest.warns(UserWarning, match=WARNING):
        fit(Mlp(), [SlowWeights(), callback])


def test_one_step_ahead_only_what_acts_before_the_update_counts():
    with pytest.warns(UserWarning, match=WARNING):
        observe(T1T2(), AfterTheStep())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        observe(T1T2(), AtTheStart(), num_sanity_val_steps=0)


class OnceLate(Mlp):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step >= 17:
            with torch.no_grad():
                self.net[0].weight.clamp_(-0.3, 0.3)


def test_one_that_begins_later_is_seen_by_its_versions():
    with pytest.warns(UserWarning, match=WARNING):
        observe(ClipR(math.inf), OnceLate(), steps=30, limit_train_batches=1.0)


class Clamping(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.clamp_(-0.3, 0.3)
        return loss


class Normalizing(torch.optim.Adam):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.div_(p.norm().clamp(min=1.0))
        return loss


class Remedied(Mlp):
    def configure_optimizers(self):
        return {"sgd": Clamping, "adam": Normalizing}[self.optimizer_name](
            self.parameters(), lr=0.1
        )


@pytest.mark.parametrize("estimator", FOLLOWS)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_remedy_is_exact(name, estimator):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*something else than the optimizer")
        found = last_hypergradient(observe(FOLLOWS[estimator](), Remedied(name)))
    assert relative_error(found, truth(lambda: Remedied(name))) < 1e-5


class NoisyForward(Mlp):
    """Moves θ for the gradient alone; the step is made from where it was."""

    def on_train_batch_start(self, batch, batch_idx):
        self.kept = [p.detach().clone() for p in self.parameters()]
        for p in self.parameters():
            p.data.add_(0.01)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        for p, value in zip(self.parameters(), self.kept, strict=True):
            p.data.copy_(value)


class Teacher(Mlp):
    """What the optimizer is given, and gets no gradient, may follow by an average."""

    def __init__(self):
        super().__init__()
        self.teacher = torch.nn.Linear(4, 5)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.teacher.weight.data.lerp_(self.net[0].weight.data, 0.1)


class AveragesForValidation(Mlp):
    """Other weights during a validation, as averaging callbacks put them in place."""

    def on_validation_start(self):
        self.kept = [p.detach().clone() for p in self.parameters()]
        for p in self.parameters():
            p.data.mul_(0.9)

    def on_validation_end(self):
        with torch.no_grad():
            for p, value in zip(self.parameters(), self.kept, strict=True):
                p.copy_(value)


@pytest.mark.parametrize("kind", [Mlp, NoisyForward, Teacher, AveragesForValidation])
def test_no_warning_where_theta_is_back_in_time(kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*something else than the optimizer")
        observe(ClipR(math.inf), kind(), steps=30)


# ---------------------------------------------------------------------------- the optimizer's state

OF_STATE = r"something else than the optimizer changes its state.*'exp_avg' of 'net\.0\.weight' and"


class Pruned(Mlp):
    """Adam's first moments shrink at the fourth step, as ReLoRA's do."""

    def __init__(self):
        super().__init__("adam", granularity="model", schedule=False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 4:
            self.change(self.trainer.optimizers[0])

    def change(self, optimizer):
        for state in optimizer.state.values():
            state["exp_avg"].mul_(0.1)


class Replaced(Pruned):
    def change(self, optimizer):
        for state in optimizer.state.values():
            state["exp_avg"] = torch.zeros_like(state["exp_avg"])


class Cleared(Pruned):
    """Adam counts its steps there as well, and starts anew."""

    def change(self, optimizer):
        for state in optimizer.state.values():
            del state["exp_avg"]
        optimizer.state.clear()


class Loaded(Pruned):
    def change(self, optimizer):
        optimizer.load_state_dict(self.fresh)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 3:
            self.fresh = copy.deepcopy(self.trainer.optimizers[0].state_dict())


class PrunedInTheStep(Pruned):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        if self.global_step == 4:
            self.change(optimizer)


@pytest.mark.parametrize("estimator", FOLLOWS)
@pytest.mark.parametrize("kind", [Pruned, Replaced, Cleared, Loaded, PrunedInTheStep])
def test_a_change_of_the_state_is_warned_about(kind, estimator):
    text = OF_STATE.replace("exp_avg", "step") if kind in (Cleared, Loaded) else OF_STATE
    with pytest.warns(UserWarning, match=text) as caught:
        observe(FOLLOWS[estimator](), kind())
    assert len([w for w in caught if "something else" in str(w.message)]) == 1


@pytest.mark.parametrize("kind", [Pruned, Cleared])
def test_one_step_ahead_the_state_does_not_count(kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*something else than the optimizer")
        observe(T1T2(), kind())


class Pruning(torch.optim.Adam):
    """Counts before it calls the closure, in its state as well."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr, eps=1e-3)
        self.count = 0

    def step(self, closure=None):
        self.count += 1
        for state in self.state.values():
            state["seen"] = state.get("seen", torch.zeros(())) + 1
        loss = super().step(closure)
        if self.count == 4:
            for state in self.state.values():
                state["exp_avg"].mul_(0.1)
        return loss


class RemediedState(Mlp):
    def configure_optimizers(self):
        return Pruning(self.parameters(), lr=0.05)


@pytest.mark.parametrize("estimator", FOLLOWS)
def test_the_remedy_for_state_is_exact(estimator):
    def make():
        return RemediedState(granularity="model")

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*something else than the optimizer")
        found = last_hypergradient(observe(FOLLOWS[estimator](), make()))
    assert relative_error(found, truth(make)) < 1e-5
