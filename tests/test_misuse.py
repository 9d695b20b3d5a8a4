"""Every misuse is refused before the first optimizer step, and the message says what to do."""

from __future__ import annotations

import math
import re

import lightning.pytorch as pl
import pytest
import torch
from cases import Mlp, fit, frozen, make_trainer, train_loader, valid_loader, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    Hyperparameter,
    Interval,
    L2Mixin,
    OnlineHPOCallback,
    Positive,
    UnitInterval,
    UnrollK,
)
from lightning_hpo.compatibility import check_strategy, refuse

# --------------------------------------------------------------------- modules that cannot be tuned


class NoHyperparameter(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Unused(Mlp):
    def __init__(self):
        super().__init__()
        self.sigma = Hyperparameter(0.1)


class PenaltyOnFrozenWeights(Mlp):
    def __init__(self):
        super().__init__()
        for layer in (self.net[0], self.net[2]):
            layer.weight.requires_grad_(False)


class WithoutPenaltyCall(Mlp):
    def __init__(self):
        super().__init__(inside_loss=True)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class PenaltyCallWithoutPenalty(Mlp):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) + self.penalty()


class NoValidationLoss(Mlp):
    def validation_step(self, batch, batch_idx):
        self.log("accuracy", 1.0)


class FloatValidationLoss(Mlp):
    def validation_step(self, batch, batch_idx):
        return self.loss(batch).item()


class DetachedValidationLoss(Mlp):
    def validation_step(self, batch, batch_idx):
        return self.loss(batch).detach()


class VectorValidationLoss(Mlp):
    def validation_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


class Manual(Mlp):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        self.optimizers().step()


class Lbfgs(Mlp):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1)


class Adafactor(Mlp):
    def configure_optimizers(self):
        return torch.optim.Adafactor(self.parameters(), lr=0.1)


class SparseAdam(Mlp):
    def configure_optimizers(self):
        return torch.optim.SparseAdam(self.parameters(), lr=0.1)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        closure()
        return super().step(closure)


class Sam(Mlp):
    def configure_optimizers(self):
        return NeedsClosure(self.parameters(), lr=0.1)


class OwnClipGradients(Mlp):
    def clip_gradients(self, *args, **options):
        super().clip_gradients(*args, **options)


class OwnPrecision(Precision):
    def clip_gradients(self, *args, **options):
        super().clip_gradients(*args, **options)


class RenormalizedEmbedding(Mlp):
    """Its forward pass scales down the rows that have grown too long."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 4, max_norm=0.1)

    def loss(self, batch):
        x, y = batch
        return super().loss((x + self.table(y), y))


class NoOptimizer(Mlp):
    def configure_optimizers(self):
        return None


class TwoOptimizers(Manual):
    """Lightning itself refuses several optimizers under automatic optimization."""

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


class OwnClipping(Mlp):
    def configure_gradient_clipping(self, *args, **kwargs):
        pass


class ForgetsSuper(Mlp):
    def on_before_optimizer_step(self, optimizer):
        self.seen = True


class SparseEmbedding(Mlp):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 3, sparse=True)

    def loss(self, batch):
        return super().loss(batch) + self.embedding(batch[1]).square().mean()


class PenalizedEmbedding(SparseEmbedding):
    def __init__(self):
        super().__init__()
        self.register_l2(1e-3, "more", parameters=["embedding.weight"])


class EmptyDataset(TensorDataset):
    def __init__(self):
        super().__init__(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))


EMPTY = DataLoader(EmptyDataset(), batch_size=2)


def tune(model_class=Mlp, valid=None, **callback_options):
    """Starts a training; the callback is made first, so that it may be refused."""

    def attempt(watch):
        model = watch(model_class())
        fit(model, OnlineHPOCallback(**callback_options), valid=valid)

    return attempt


def tune_without_held_out_data(watch):
    trainer = make_trainer(callbacks=OnlineHPOCallback())
    trainer.fit(watch(Mlp()), train_loader())


def make(factory, *args, **kwargs):
    """Makes an object that is refused by itself."""
    return lambda watch: factory(*args, **kwargs)


def shard(strategy):
    """Such a Trainer cannot be built without several devices, or without DeepSpeed."""
    return lambda watch: refuse(check_strategy(object.__new__(strategy)))


def register(**options):
    def attempt(watch):
        class Model(L2Mixin, pl.LightningModule):
            pass

        model = Model()
        model.net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model.taken = 1
        model.register_l2(**{"init": 0.1, **options})

    return attempt


def register_before_the_network(watch):
    class Model(L2Mixin, pl.LightningModule):
        pass

    Model().register_l2(0.1)


MISUSES = {
    # The module.
    "no-hyperparameter": (
        tune(NoHyperparameter),
        r"NoHyperparameter has no Hyperparameter to tune\. Register one",
    ),
    "unused-hyperparameter": (
        tune(Unused),
        r"'sigma' has no effect.*does not depend on it; call it there \(.*self\.sigma\(\), without",
    ),
    "penalty-on-frozen-weights": (
        tune(PenaltyOnFrozenWeights),
        r"'l2\.net\.0' has no effect.*not trained by the optimizer",
    ),
    "penalty-not-added": (
        tune(WithoutPenaltyCall),
        r"'l2\.net\.0' has no effect.*inside_loss=True.*self\.penalty\(\).*'l2\.net\.2'",
    ),
    "penalty-added-twice": (
        tune(PenaltyCallWithoutPenalty),
        r"penalty\(\) was called, but no penalty.*inside_loss=True.*remove the call",
    ),
    "manual-optimization": (tune(Manual), r"manual optimization.*Use automatic optimization"),
    "lbfgs": (tune(Lbfgs), r"LBFGS evaluates its closure several times.*Use SGD"),
    "adafactor": (tune(Adafactor), r"Adafactor reads norms.*Use SGD"),
    "sparse-adam": (tune(SparseAdam), r"SparseAdam works on sparse gradients.*Use SGD"),
    "step-needs-closure": (tune(Sam), r"NeedsClosure: it evaluates its closure 2 times.*Use"),
    "no-optimizer": (tune(NoOptimizer), r"configure_optimizers returned (0|no) optimizer.*Use"),
    "two-optimizers": (
        tune(TwoOptimizers),
        r"returned 2 optimizers, expected one\. Use one optimizer with several",
    ),
    "own-gradient-clipping": (
        tune(OwnClipping),
        r"OwnClipping overrides configure_gradient_clipping.*Use Trainer\(gradient_clip_val",
    ),
    "own-clip-gradients": (
        tune(OwnClipGradients),
        r"OwnClipGradients overrides clip_gradients.*Use Trainer\(gradient_clip_val",
    ),
    "own-precision": (
        lambda watch: fit(watch(Mlp()), OnlineHPOCallback(), plugins=OwnPrecision()),
        r"OwnPrecision overrides clip_gradients.*Use Trainer\(gradient_clip_val",
    ),
    "embedding-with-max-norm": (
        tune(RenormalizedEmbedding),
        r"writes to the trained parameter 'table.weight' in place.*on_train_batch_end",
    ),
    "hook-without-super": (
        tune(ForgetsSuper),
        r"ForgetsSuper\.on_before_optimizer_step does not call super\(\).*Call it",
    ),
    "hook-without-super-and-without-updates": (
        tune(ForgetsSuper, estimator=UnrollK(2), every_n_steps=100),
        r"ForgetsSuper\.on_before_optimizer_step does not call super\(\).*Call it",
    ),
    "sparse-gradient": (
        tune(SparseEmbedding),
        r"parameter has a sparse gradient, expected dense ones; use nn.Embedding\(sparse=False\)",
    ),
    "sparse-gradient-without-the-callback": (
        lambda watch: fit(watch(PenalizedEmbedding())),
        r"PenalizedEmbedding: a penalty acts on 'embedding.weight', which gets a sparse.*Use nn\.E",
    ),
    # The held-out data and their loss.
    "no-held-out-data": (tune_without_held_out_data, r"no held-out.*Pass dataloader="),
    "empty-held-out-data": (
        tune(dataloader=EMPTY),
        r"T2 data.*are empty \(EmptyDataset with no example\); pass a dataloader",
    ),
    "no-held-out-batch": (tune(dataloader=[]), r"T2 data.*yield no batch; pass a dataloader"),
    "dataloader-index": (
        tune(dataloader_idx=2, valid=[valid_loader(), valid_loader()]),
        r"dataloader_idx=2, but there are 2 validation dataloaders; expected 0 to 1",
    ),
    "no-validation-loss": (
        tune(NoValidationLoss),
        r"NoValidationLoss\.validation_step returned no loss and logged \['accuracy'\]\. "
        r"Return the loss.*monitor=",
    ),
    "validation-loss-of-wrong-name": (
        tune(NoValidationLoss, monitor="loss"),
        r"does not log monitor='loss'; it logged \['accuracy'\]\. Return the loss.*monitor=",
    ),
    "float-validation-loss": (
        tune(FloatValidationLoss),
        r"FloatValidationLoss\.validation_step is a float, expected a tensor.*\.item\(\)",
    ),
    "detached-validation-loss": (
        tune(DetachedValidationLoss),
        r"DetachedValidationLoss\.validation_step is detached.*without \.detach\(\)",
    ),
    "vector-validation-loss": (
        tune(VectorValidationLoss),
        r"VectorValidationLoss\.validation_step has shape \(20,\), expected a scalar.*\.mean\(\)",
    ),
    "detached-loss-function": (
        tune(validation_loss=lambda module, batch: torch.tensor(1.0)),
        r"validation loss of the loss function is detached.*Compute it without",
    ),
    # The strategy; tests/test_sharded.py has what ModelParallelStrategy refuses.
    **{
        strategy.__name__: (
            shard(strategy),
            rf"{strategy.__name__} .*Use ModelParallelStrategy\(.* with fully_shard .*'ddp'",
        )
        for strategy in (FSDPStrategy, DeepSpeedStrategy)
    },
    # Arguments of the callback.
    "estimator-class": (
        make(OnlineHPOCallback, ClipR),
        r"ClipR is a class, expected an instance of an Estimator: ClipR\(\)",
    ),
    "estimator-name": (
        make(OnlineHPOCallback, "ClipR"),
        r"estimator='ClipR', expected an instance",
    ),
    "optimizer-object": (
        make(OnlineHPOCallback, optimizer=0.1),
        r"optimizer=0\.1, expected a callable from a list of tensors",
    ),
    "optimizer-factory": (
        tune(optimizer=lambda raw: raw),
        r"optimizer=.* returned a list, expected a torch\.optim\.Optimizer, for example",
    ),
    "derivatives": (
        make(OnlineHPOCallback, derivatives="exact"),
        r"derivatives='exact', expected one of \('auto', .*'finite_difference'\)",
    ),
    "every-0": (make(OnlineHPOCallback, every_n_steps=0), r"every_n_steps=0, expected at least 1"),
    "every-half": (make(OnlineHPOCallback, every_n_steps=0.5), r"every_n_steps=0\.5.*integer"),
    "every-true": (make(OnlineHPOCallback, every_n_steps=True), r"every_n_steps=True.*integer"),
    "every-less-than-the-window": (
        make(OnlineHPOCallback, UnrollK(5), every_n_steps=4),
        r"every_n_steps=4 is smaller than the window of 5 steps of UnrollK; make it at least",
    ),
    "warmup": (make(OnlineHPOCallback, warmup_steps=-1), r"warmup_steps=-1, expected at least 0"),
    "negative-dataloader-index": (
        make(OnlineHPOCallback, dataloader_idx=-1),
        r"dataloader_idx=-1, expected at least 0",
    ),
    # Arguments of the estimators.
    "radius-0": (make(ClipR, radius=0), r"ClipR: radius=0, expected a positive number or inf"),
    "radius-negative": (make(ClipR, radius=-2.0), r"radius=-2\.0, expected a positive number"),
    "radius-nan": (make(ClipR, radius=math.nan), r"radius=nan, expected a positive number"),
    "radius-text": (make(ClipR, radius="20"), r"radius='20', expected a number"),
    "decay-negative": (make(ClipR, decay=-0.1), r"decay=-0\.1, expected a number in \[0, 1\]"),
    "decay-large": (make(ClipR, decay=1.5), r"decay=1\.5, expected a number in \[0, 1\]"),
    "decay-nan": (make(ClipR, decay=math.nan), r"decay=nan, expected a number in \[0, 1\]"),
    "k-0": (make(UnrollK, 0), r"UnrollK: k=0, expected at least 1 step"),
    "k-float": (make(UnrollK, 2.0), r"UnrollK: k=2\.0 is a float, expected an integer"),
    "k-true": (make(UnrollK, True), r"UnrollK: k=True is a bool, expected an integer"),
    "mode": (make(UnrollK, 2, "backward"), r"mode='backward', expected one of \('auto', 'forw"),
    "scale-by-lr": (make(T1T2, scale_by_lr=0.1), r"scale_by_lr=0\.1, expected True or False"),
    # Hyperparameters and their registration.
    "init-nan": (
        make(Hyperparameter, math.nan),
        r"Hyperparameter: init=nan is refused: .*not finite",
    ),
    "init-outside": (
        make(Hyperparameter, -1.0, Positive()),
        r"init=-1\.0 is refused: got the value -1, which lies outside \[1e-10, 10000\] of Positive"
        r".*start inside that range",
    ),
    "init-zero": (
        make(Hyperparameter, 0.0, Positive()),
        r"init=0\.0 is refused: .*outside.*Positive",
    ),
    "init-one": (
        make(Hyperparameter, 1.0, UnitInterval()),
        r"init=1\.0 is refused: .*outside \[0\.0001, 0\.9999\] of UnitInterval",
    ),
    "init-above": (
        make(Hyperparameter, torch.tensor([0.5, 3.0]), Interval(0, 2)),
        r"got the value \[0\.5, 3\.0\], which lies outside \[0, 2\] of Interval",
    ),
    "init-text": (make(Hyperparameter, "0.1"), r"init='0\.1' is a str, expected a float"),
    "init-integers": (
        make(Hyperparameter, torch.tensor([1, 2])),
        r"dtype torch\.int64, expected a floating-point tensor",
    ),
    "init-empty": (make(Hyperparameter, torch.zeros(0)), r"init is empty, expected at least one"),
    "constraint-class": (
        make(Hyperparameter, 0.1, Positive),
        r"constraint=.* is a type, expected an instance.*for example Positive\(\)",
    ),
    "granularity": (
        register(granularity="neuron"),
        r"granularity='neuron', expected one of \('model', 'layer', 'parameter'\)",
    ),
    "l2-init": (register(init=-1.0), r"init=-1\.0 is refused: .*start inside that range"),
    "l2-name-taken": (register(name="taken"), r"name='taken' is taken in Model.*free"),
    "l2-name-dotted": (register(name="a.b"), r"name='a\.b' is no name.*attribute name"),
    "l2-parameter-name": (
        register(parameters=["net.0.wieght"]),
        r"Model has no parameter 'net\.0\.wieght'; the closest names are \['net\.0\.weight'",
    ),
    "l2-foreign-parameter": (
        register(parameters=[nn.Parameter(torch.zeros(7))]),
        r"parameter of shape \(7,\) that is not registered in Model; pass parameters of this",
    ),
    "l2-no-parameter": (
        register(parameters=[torch.zeros(7)]),
        r"parameters holds a Tensor, expected parameters of this module or their dotted names",
    ),
    "l2-empty-list": (register(parameters=[]), r"Model has no weights to regularize.*parameters="),
    "l2-before-the-network": (
        register_before_the_network,
        r"Model has no weights to regularize.*Call it after the network has been built",
    ),
}


@pytest.mark.parametrize(("attempt", "message"), MISUSES.values(), ids=MISUSES)
def test_misuse_is_refused_before_the_first_step(attempt, message):
    watched = []
    stepped = []

    def watch(model):
        watched.append((model, weights(model).clone()))
        return model

    hook = register_optimizer_step_post_hook(lambda *args: stepped.append(1))
    try:
        with pytest.raises((MisconfigurationException, ValueError, TypeError)) as caught:
            attempt(watch)
    finally:
        hook.remove()
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert not stepped
    for model, before in watched:
        assert torch.equal(weights(model), before)


def test_all_findings_are_reported_together():
    class Everything(NoHyperparameter):
        def configure_optimizers(self):
            return [torch.optim.LBFGS(self.parameters()), torch.optim.SGD(self.parameters(), 0.1)]

        def configure_gradient_clipping(self, *args, **kwargs):
            pass

        def training_step(self, batch, batch_idx):
            pass

    model = Everything()
    model.automatic_optimization = False
    with pytest.raises(MisconfigurationException) as caught:
        make_trainer(callbacks=OnlineHPOCallback()).fit(model, train_loader())
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 6
    for culprit in (
        "no Hyperparameter",
        "manual optimization",
        "2 optimizers",
        "LBFGS",
        "configure_gradient_clipping",
        "held-out",
    ):
        assert sum(culprit in line for line in lines[1:]) == 1, culprit


def test_a_hook_that_forgets_super_is_refused_without_the_callback_too():
    """Otherwise the registered penalties would silently do nothing."""
    stepped = []
    hook = register_optimizer_step_post_hook(lambda *args: stepped.append(1))
    try:
        with pytest.raises(MisconfigurationException, match=r"ForgetsSuper.*does not call super"):
            fit(ForgetsSuper())
    finally:
        hook.remove()
    assert len(stepped) <= 1


def test_the_same_modules_train_when_used_rightly():
    """The refusals above are not of the modules' other properties."""

    class CallsSuper(Mlp):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)

    class LogsItsLoss(Mlp):
        def validation_step(self, batch, batch_idx):
            self.log("held_out", self.loss(batch))

    class ReturnsDict(Mlp):
        def validation_step(self, batch, batch_idx):
            return {"loss": self.loss(batch)}

    runs = {
        Mlp: {},
        CallsSuper: {},
        LogsItsLoss: {"monitor": "held_out"},
        ReturnsDict: {},
        NoValidationLoss: {"validation_loss": lambda module, batch: module.loss(batch)},
    }
    values = []
    for kind, options in runs.items():
        callback = OnlineHPOCallback(T1T2(), optimizer=frozen, **options)
        fit(kind(), callback)
        values.append(torch.stack(list(callback.history[-1].hypergradients.values())))
    for other in values[1:]:
        assert torch.equal(other, values[0])


def test_no_strategy_of_whole_parameters_is_refused():
    trainer = make_trainer()
    assert check_strategy(trainer.strategy) == []
