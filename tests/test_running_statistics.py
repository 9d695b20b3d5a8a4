"""Running statistics are state that training moves: hypergradients see how λ moves them."""

import copy
import functools
import math
import warnings
from functools import partial
from types import MappingProxyType

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import (
    TRAIN,
    VALID,
    Mlp,
    fit,
    flat,
    frozen,
    last_hypergradient,
    make_optimizer,
    make_trainer,
    observe,
    relative_error,
    train_loader,
    valid_loader,
    validation_loss,
)
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    GaussianNoiseMixin,
    Hyperparameter,
    Implicit,
    L2Mixin,
    OnlineHPOCallback,
    UnrollK,
    named_hyperparameters,
    objectives,
)
from lightning_hpo.distributed import gather
from lightning_hpo.statistics import RunningStatistics

STEPS = 6
ESTIMATORS = {
    "ClipR": lambda: ClipR(math.inf),
    "forward": lambda: UnrollK(STEPS, "forward"),
    "reverse": lambda: UnrollK(STEPS, "reverse"),
}
BACKENDS = ["reverse", "forward", "finite_difference"]


class Twice(nn.Module):
    """A layer that a forward pass goes through two times."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, momentum=0.3)

    def forward(self, x):
        return self.norm(self.norm(x).tanh() + x)


class Images(nn.Module):
    """Convolutions; momentum=None is a cumulative average."""

    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv1d(1, 5, 2, bias=False)
        self.norm = norm

    def forward(self, x):
        return self.norm(self.conv(x.unsqueeze(1))).tanh().mean(-1)


class Direct(nn.BatchNorm1d):
    """As layers of other packages do: a subclass with a forward of its own."""

    def forward(self, x):
        rate = self.momentum if self.training else 0.0
        return torch.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            rate,
            self.eps,
            False,
        ).tanh()


def flat_net(norm):
    return nn.Sequential(nn.Linear(4, 5, bias=False), norm, nn.Tanh())


class Functional(nn.Module):
    """Statistics in buffers of a module that is no normalization layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("square", torch.ones(5))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.square, None, None, self.training, 0.3)


class Assigned(nn.BatchNorm1d):
    """Puts a new tensor in the place of a buffer."""

    def forward(self, x):
        output = super().forward(x)
        if self.training:
            self.running_mean = 0.5 * self.running_mean
        return output


NETS = {
    "batch": lambda: flat_net(nn.BatchNorm1d(5)),
    "cumulative": lambda: flat_net(nn.BatchNorm1d(5, momentum=None, affine=False)),
    "twice": lambda: flat_net(Twice()),
    "direct": lambda: flat_net(Direct(5)),
    "functional": lambda: flat_net(Functional()),
    "assigned": lambda: flat_net(Assigned(5)),
    "images": lambda: Images(nn.BatchNorm1d(5, momentum=None)),
    "instance": lambda: Images(nn.InstanceNorm1d(5, track_running_stats=True)),
    "instance_affine": lambda: Images(nn.InstanceNorm1d(5, affine=True, track_running_stats=True)),
}


class Lit(L2Mixin, pl.LightningModule):
    """A classifier with a normalized hidden layer, and one λ on all weights."""

    nets = NETS

    def __init__(self, net="batch", optimizer="momentum"):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(self.nets[net](), nn.Linear(5, 3))
        self.optimizer_name = optimizer
        self.register()

    def register(self):
        self.register_l2(init=0.05)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return make_optimizer(self.optimizer_name, self.parameters())


class Move(pl.Callback):
    """Moves λ before the first step, or at one step only."""

    def __init__(self, distance, at=None):
        self.distance, self.at = distance, at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        (h,) = named_hyperparameters(module).values()
        if trainer.global_step == (self.at or 0):
            h.raw.add_(self.distance)
            self.distance = 0.0  # once, also where micro-batches are accumulated


def truth(make, at=None, callbacks=(), **options):
    """Central differences of whole trainings over the one raw λ."""
    losses = []
    for sign in (1, -1):
        torch.manual_seed(0)
        model = make()
        fit(model, [Move(sign * 1e-4, at), *callbacks], **{"steps": STEPS, **options})
        losses.append(validation_loss(model.eval()))
    return torch.tensor([(losses[0] - losses[1]) / 2e-4])


def found(estimator, model, **options):
    torch.manual_seed(0)
    callback = observe(estimator, model, **{"steps": STEPS, **options})
    return last_hypergradient(callback)


def make(net="batch", optimizer="momentum"):
    return Lit(net, optimizer)


@functools.cache
def whole_trainings(net, optimizer="momentum", **options):
    return truth(lambda: make(net, optimizer), **options)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hypergradients_equal_whole_trainings(net, estimator):
    expected = whole_trainings(net)
    assert expected.abs().min() > 1e-5
    assert relative_error(found(ESTIMATORS[estimator](), make(net)), expected) < 1e-6


@pytest.mark.parametrize("derivatives", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("net", ["twice", "instance_affine", "functional"])
def test_every_backend(net, estimator, derivatives):
    result = found(ESTIMATORS[estimator](), make(net), derivatives=derivatives)
    assert relative_error(result, whole_trainings(net)) < 1e-5


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adam", {}),
        ("sgd", {"accumulate_grad_batches": 2}),
        ("adamw", {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3}),
    ],
)
def test_optimizers_clipping_and_accumulation(optimizer, options, estimator):
    """Micro-batches update the statistics one after the other."""
    expected = whole_trainings("twice", optimizer, **options)
    result = found(ESTIMATORS[estimator](), make("twice", optimizer), **options)
    assert relative_error(result, expected) < 1e-5


class Noisy(GaussianNoiseMixin, Lit):
    """λ acts on the statistics in the forward pass itself."""

    def register(self):
        self.register_noise(0.3, at="input")


class Summed(Lit):
    """As does one that scales what is normalized."""

    def register(self):
        self.scale = Hyperparameter(0.7)

    def loss(self, batch):
        x, y = batch
        return super().loss((x * self.scale() if self.training else x, y))


class Masked(DropoutMixin, Lit):
    """λ has no derivative, and is differenced."""

    def register(self):
        self.net[0].insert(0, nn.Dropout(0.2))
        self.register_dropout()


@pytest.mark.parametrize("kind", [Noisy, Summed])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "T1T2"])
@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
def test_hyperparameters_that_act_on_a_batch(kind, estimator, derivatives):
    """T1T2 sees what the last step did to the statistics."""
    is_last = estimator == "T1T2"
    expected = truth(kind, STEPS - 1 if is_last else None, accumulate_grad_batches=2)
    result = found(
        {**ESTIMATORS, "T1T2": T1T2}[estimator](),
        kind(),
        derivatives=derivatives,
        accumulate_grad_batches=2,
    )
    assert relative_error(result, expected) < 1e-5


@pytest.mark.parametrize("accumulated", [1, 2])
def test_forward_and_reverse_agree_on_masks(accumulated):
    one, two = (
        found(ESTIMATORS[name](), Masked(), accumulate_grad_batches=accumulated)
        for name in ("forward", "reverse")
    )
    assert one.abs().min() > 1e-6
    torch.testing.assert_close(one, two, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------- regimes of a training


class Freeze(pl.Callback):
    """Normalization layers go into evaluation mode after some steps."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._NormBase) and trainer.global_step >= self.after:
                m.eval()


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("derivatives", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_frozen_layers(estimator, derivatives, after):
    """Where they are frozen on the way, the training loss depends on what λ has made of them."""
    expected = truth(make, callbacks=[Freeze(after)])
    callback = OnlineHPOCallback(ESTIMATORS[estimator](), optimizer=frozen, derivatives=derivatives)
    fit(make(), [Freeze(after), callback], steps=STEPS)
    assert relative_error(last_hypergradient(callback), expected) < 1e-5


class Before(Lit):
    """The penalty is on the weights before the layer, which takes their scale out again."""

    def register(self):
        self.register_l2(init=0.05, parameters=[self.net[0][0].weight])


def test_taking_them_as_constants_is_far_off(monkeypatch):
    """What the tests above would say otherwise."""
    model = partial(Before, optimizer="sgd")
    expected = truth(model, steps=40)
    assert relative_error(found(ClipR(math.inf), model(), steps=40), expected) < 1e-6
    monkeypatch.setattr(RunningStatistics, "__len__", lambda self: 0)
    monkeypatch.setattr(RunningStatistics, "buffers", lambda self, state=None: [])
    monkeypatch.setattr(RunningStatistics, "leaves", lambda self, state: [])
    assert relative_error(found(ClipR(math.inf), model(), steps=40), expected) > 0.3


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_training_is_bit_identical(estimator, accumulated):
    results = []
    for own in ([], [OnlineHPOCallback(ESTIMATORS[estimator](), optimizer=frozen)]):
        model = make("twice")
        fit(model, own, steps=STEPS, accumulate_grad_batches=accumulated)
        results.append([*model.parameters(), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_restart():
    """Every window starts from the statistics of the first."""
    for mode in ("forward", "reverse"):
        model = make()
        callback = OnlineHPOCallback(
            UnrollK(3, mode, restart=True), optimizer=lambda raw: torch.optim.SGD(raw, lr=1e-9)
        )
        fit(model, callback, steps=STEPS, limit_train_batches=3, max_epochs=-1)
        first, second = (flat(r.hypergradients.values()) for r in callback.history)
        torch.testing.assert_close(first, second, rtol=1e-6, atol=0)
        assert relative_error(first, truth(make, steps=3)) < 1e-5


@pytest.mark.parametrize("name", ["ClipR", "forward", "reverse"])
def test_a_resumed_training_goes_on(name, tmp_path):
    estimator = {
        "ClipR": lambda: ClipR(math.inf),
        "forward": lambda: UnrollK(4, "forward"),
        "reverse": lambda: UnrollK(4, "reverse"),
    }[name]
    whole = observe(estimator(), make(), steps=8)
    callback = OnlineHPOCallback(estimator(), optimizer=frozen)
    trainer = fit(make(), callback, steps=5)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    callback = OnlineHPOCallback(estimator(), optimizer=frozen)
    fit(make(), callback, steps=8, ckpt_path=str(tmp_path / "half.ckpt"))
    torch.testing.assert_close(
        last_hypergradient(callback), last_hypergradient(whole), rtol=1e-12, atol=0
    )


class Two(Lit):
    def register(self):
        (first, last) = (self.net[0][0].weight, self.net[1].weight)
        self.register_l2(init=0.05, name="first", parameters=[first])
        self.register_l2(init=0.02, name="last", parameters=[last])


def test_several_estimators():
    """As each of them alone, which the tests above hold to the truth."""
    callback = OnlineHPOCallback(
        {"first": ClipR(math.inf), "last": UnrollK(STEPS, "reverse")},
        optimizer=frozen,
        every_n_steps=STEPS,
    )
    fit(Two(), callback, steps=STEPS)
    alone = observe(ClipR(math.inf), Two(), steps=STEPS, every_n_steps=STEPS)
    torch.testing.assert_close(
        last_hypergradient(callback), last_hypergradient(alone), rtol=1e-8, atol=0
    )


# ------------------------------------------------------------------------------------ several ranks


RANK_STEPS = 5


class Ranks(Lit):
    """Each rank has examples, and statistics, of its own."""

    def register(self):
        super().register()
        self.register_buffer("result", torch.zeros(2))

    def train_dataloader(self):
        return train_loader(sampler=self.part(TRAIN, shuffle=False), batch_size=5)

    def val_dataloader(self):
        return valid_loader(sampler=self.part(VALID, shuffle=False), batch_size=10)

    def part(self, data, **options):
        return DistributedSampler(data[0], self.trainer.world_size, self.global_rank, **options)

    def validation_step(self, batch, batch_idx):
        return self.loss(VALID)  # on all ranks, each with its own statistics


class Report(pl.Callback):
    """Leaves the mean of the ranks' L_V, and the hypergradient, in what comes back from them."""

    def __init__(self, callback=None):
        self.callback = callback

    def on_train_end(self, trainer, module):
        module.eval()
        loss = module.loss(VALID).detach()
        torch.distributed.all_reduce(loss)
        module.result[0] = loss / trainer.world_size
        if self.callback is not None:
            module.result[1] = last_hypergradient(self.callback)[0]


@pytest.mark.usefixtures("within_two_minutes")
@pytest.mark.parametrize("broadcasts", [True, False])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(
    "estimator", [ClipR(math.inf), UnrollK(RANK_STEPS, "reverse")], ids=["ClipR", "reverse"]
)
def test_ranks_with_statistics_of_their_own(estimator, accumulated, broadcasts):
    """Every step starts from those of the first rank, where buffers are broadcast."""

    def run(distance=0.0, callback=None):
        model = Ranks("twice")
        named_hyperparameters(model)["l2"].raw.add_(distance)
        make_trainer(
            RANK_STEPS,  # within an epoch: a validation broadcasts the statistics once more
            callbacks=[Report(callback), *([callback] if callback else [])],
            devices=2,
            strategy=DDPStrategy(start_method="fork", broadcast_buffers=broadcasts),
            use_distributed_sampler=False,
            accumulate_grad_batches=accumulated,
        ).fit(model)
        return model.result

    expected = (run(1e-4)[0] - run(-1e-4)[0]) / 2e-4
    result = run(callback=OnlineHPOCallback(estimator, optimizer=frozen))[1]
    assert abs(result - expected) < 1e-5 * abs(expected)


# ------------------------------------------------------------------------- what cannot be followed


class Fused(nn.BatchNorm1d):
    """An operator that has no derivative with respect to the statistics."""

    def forward(self, x):
        output, _, _ = torch.native_batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            self.momentum,
            self.eps,
        )
        return output


class WithFused(Lit):
    nets = MappingProxyType({"batch": lambda: flat_net(Fused(5))})


def test_what_has_no_derivative_is_named():
    with pytest.warns(UserWarning, match="takes the running statistics.*'?running_mean"):
        result = found(ClipR(math.inf), WithFused())
    assert result.isfinite().all()


class Own(nn.Module):
    """What many write by hand: an average under no_grad."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        mean = x.mean(0) if self.training else self.mean
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(mean, 0.3)
        return x - mean


class Detached(nn.BatchNorm1d):
    """A subclass that updates its statistics from what has no graph."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean, variance = x.mean(0), x.var(0)
        self.running_mean += 0.3 * (mean.detach() - self.running_mean)
        self.running_var.data.lerp_(variance.data, 0.3)
        return (x - mean) / (variance + self.eps).sqrt()


class WithoutGraph(Lit):
    nets = MappingProxyType(
        {"own": lambda: flat_net(Own()), "detached": lambda: flat_net(Detached(5))}
    )


UNSEEN = {"own": "'net.0.1.mean'", "detached": "'net.0.1.running_mean', 'net.0.1.running_var'"}


@pytest.mark.parametrize("net", UNSEEN)
@pytest.mark.parametrize("estimator", ["ClipR", "forward"])
def test_what_is_written_without_a_graph_is_followed_by_differences(net, estimator):
    with pytest.warns(UserWarning, match=f"uses finite differences, because .*{UNSEEN[net]}"):
        result = found(ESTIMATORS[estimator](), WithoutGraph(net))
    assert relative_error(result, truth(lambda: WithoutGraph(net))) < 1e-5


@pytest.mark.parametrize("derivatives", ["auto", "reverse", "finite_difference"])
@pytest.mark.parametrize("net", UNSEEN)
def test_reverse_mode_takes_it_as_constant_and_says_so(net, derivatives):
    with pytest.warns(UserWarning, match=f"as constants, because .*{UNSEEN[net]}"):
        result = found(
            UnrollK(STEPS, "reverse"),
            WithoutGraph(net),
            derivatives=derivatives,
            every_n_steps=STEPS,
        )
    assert relative_error(result, truth(lambda: WithoutGraph(net))) > 1e-3


class Looks(Lit):
    """Reads its statistics where a graph would be in the way."""

    def training_step(self, batch, batch_idx):
        self.seen = float(self.net[0][1].running_mean.numpy().mean())
        return super().training_step(batch, batch_idx)


class Copies(Lit):
    def training_step(self, batch, batch_idx):
        copied = copy.deepcopy(self.net)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        F.cross_entropy(copied(batch[0]), batch[1]).backward()
        optimizer.step()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", [Looks, Copies])
def test_a_step_may_read_and_copy_them(kind, estimator):
    assert relative_error(found(ESTIMATORS[estimator](), kind()), truth(kind)) < 1e-6


class InTrainingMode(Lit):
    def validation_step(self, batch, batch_idx):
        self.train()
        return self.loss(batch)


class NormInTrainingMode(Lit):
    """A test time adaptation: the layer goes by the statistics of the batch."""

    def on_validation_model_eval(self):
        self.eval()
        self.net[0][1].train()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", [InTrainingMode, NormInTrainingMode])
def test_a_layer_may_write_to_them_in_a_validation(kind, estimator):
    losses = []
    for sign in (1, -1):
        model = kind()
        fit(model, [Move(sign * 1e-4)], steps=STEPS)
        losses.append(validation_loss(model.train()))
    expected = torch.tensor([(losses[0] - losses[1]) / 2e-4])
    assert relative_error(found(ESTIMATORS[estimator](), kind()), expected) < 1e-6


class SmoothInput(Lit):
    """A penalty on the gradient over the input."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        output = self.net(x)
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return F.cross_entropy(output, batch[1]) + 0.1 * slope.square().mean()


class SmoothLogits(Lit):
    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        loss = F.cross_entropy(self.net(x), batch[1])
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 10 * slope.square().sum()


def says_what_is_missing():
    """Whether torch raises where a third derivative of ``batch_norm`` is asked for."""
    leaf = torch.randn(4, 2, requires_grad=True)
    derivative = F.batch_norm(leaf, None, None, training=True)
    try:
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative.pow(3).sum(), leaf, create_graph=True)
    except RuntimeError:
        return True
    return False


@pytest.mark.skipif(
    not says_what_is_missing(),
    reason="the third derivative of batch_norm is wrong in this version of torch, without an error",
)
@pytest.mark.parametrize("kind", [SmoothInput, SmoothLogits])
@pytest.mark.parametrize("estimator", ["ClipR", "reverse"])
def test_a_third_derivative_that_is_missing_is_replaced_by_differences(kind, estimator):
    with pytest.warns(UserWarning, match=r"3rd\+ order"):
        result = found(ESTIMATORS[estimator](), kind())
    assert relative_error(result, truth(kind)) < 1e-5


def gtgv():
    return T1T2(scale_by_lr=False)


def scripted():
    return flat_net(torch.jit.script(nn.BatchNorm1d(5)))


class WithScripted(Lit):
    nets = MappingProxyType({"batch": scripted})


@pytest.mark.parametrize(
    ("estimator", "kind", "text"),
    [
        (Implicit, Lit, r"\['net\.0\.1'\] as constants.*because Implicit does not follow"),
        (gtgv, Noisy, r"\['net\.0\.1'\] as constants.*because T1T2 does not follow"),
        (ClipR, WithScripted, r"\['net\.0\.1'\] as constants.*in TorchScript"),
        (lambda: UnrollK(2), WithScripted, r"\['net\.0\.1'\] as constants.*in TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_layers_that_are_constants_are_named_once(estimator, kind, text):
    with pytest.warns(UserWarning, match=text) as caught:
        found(estimator(), kind())
    assert sum("as constants" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize(
    ("estimator", "kind", "callbacks"),
    [
        (ClipR, Lit, []),
        (lambda: UnrollK(2), Noisy, []),
        (T1T2, Noisy, []),
        (gtgv, Lit, []),  # no λ acts on a forward pass of the last step
        (T1T2, WithScripted, []),
        (Implicit, Mlp, []),
        (Implicit, Lit, [Freeze(0)]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_nothing_is_said_where_nothing_is_missed(estimator, kind, callbacks):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*as constants")
        callback = OnlineHPOCallback(estimator(), optimizer=frozen)
        fit(kind(), [*callbacks, callback], steps=3)
    assert last_hypergradient(callback).isfinite().all()


class Synchronized(nn.SyncBatchNorm):
    """Torch's own runs on a GPU only. Here each rank normalizes by itself."""

    def forward(self, x):
        return nn.BatchNorm1d.forward(self, x)


class WithSynchronized(Ranks):
    nets = MappingProxyType({"batch": lambda: flat_net(Synchronized(5))})


class Listen(pl.Callback):
    """Counts, on each rank, the warnings that name the layer."""

    text = "['net.0.1'] as constants: hypergradients miss how λ moves them, because they are those"

    def on_fit_start(self, trainer, module):
        def listen(message, *_):
            listen.count += self.text in str(message)

        listen.count = 0  # where a replay that warns does not change what the trainer reaches
        warnings.simplefilter("always")
        warnings.showwarning = listen  # of this process, which ends with the training

    def on_train_end(self, trainer, module):
        module.result[:] = torch.tensor(gather(warnings.showwarning.count))


@pytest.mark.usefixtures("within_two_minutes")
@pytest.mark.parametrize(
    ("estimator", "kind", "counts"),
    [
        (ClipR, WithSynchronized, [1, 1]),
        (ClipR, Ranks, [0, 0]),
        (T1T2, WithSynchronized, [0, 0]),  # replays nothing
    ],
)
def test_layers_that_are_synchronized_between_ranks(estimator, kind, counts, monkeypatch):
    # It refuses such layers on a CPU; the processes of the ranks are copies of this one.
    monkeypatch.setattr(
        DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda self, module: None
    )
    model = kind()
    make_trainer(
        2,
        callbacks=[Listen(), OnlineHPOCallback(estimator(), optimizer=frozen)],
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
    ).fit(model)
    assert model.result.tolist() == counts


def test_one_rank_has_nothing_to_synchronize():
    """The layer is that of one process, and is followed."""

    class Own(Lit):
        nets = MappingProxyType({"sync": lambda: flat_net(Synchronized(5))})

    expected = truth(lambda: Own("sync"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*as constants")
        assert relative_error(found(ClipR(math.inf), Own("sync")), expected) < 1e-6


def test_nothing_is_carried_along_without_need(monkeypatch):
    """T1T2 on a penalty in the gradient replays nothing; other networks have no statistics."""

    def refuse(*args, **kwargs):
        raise AssertionError("the kernels were exchanged")

    monkeypatch.setattr(objectives, "differentiable_statistics", refuse)
    observe(T1T2(), make(), steps=3)
    observe(ClipR(), Mlp(), steps=3)
    with pytest.raises(AssertionError, match="exchanged"):
        observe(ClipR(), make(), steps=3)


# ------------------------------------------------------------------- state of the user's own making


class Stateful(Lit):
    """Carries a hidden state from batch to batch, detached as is usual."""

    def register(self):
        super().register()
        self.cell = nn.GRUCell(4, 5)
        self.hidden = None

    def loss(self, batch):
        x, y = batch
        if not self.training:
            return F.cross_entropy(self.net[1](self.cell(x)), y)
        start = None if self.hidden is None else self.hidden.detach()
        self.hidden = self.cell(x, start)
        return F.cross_entropy(self.net[1](self.hidden), y)


class Reset(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.hidden = None


def test_a_hidden_state_is_a_constant():
    """The estimate leaves out how λ has moved the state; exact where every batch starts anew."""
    result = found(ClipR(math.inf), Stateful())
    assert 1e-4 < relative_error(result, truth(Stateful)) < 0.2
    callback = OnlineHPOCallback(ClipR(math.inf), optimizer=frozen)
    torch.manual_seed(0)
    fit(Stateful(), [Reset(), callback], steps=STEPS)
    expected = truth(Stateful, callbacks=[Reset()])
    assert relative_error(last_hypergradient(callback), expected) < 1e-6


class Deep(pl.LightningModule):
    """Ten normalized layers in single precision."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [
                layer
                for inputs in (4, *[32] * 9)
                for layer in (nn.Linear(inputs, 32), nn.BatchNorm1d(32), nn.ReLU())
            ]
            self.net = nn.Sequential(*layers, nn.Linear(32, 3)).float()
        self.keep = Hyperparameter(0.9)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x.float()), y) * self.keep().float()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


@pytest.mark.parametrize("seed", range(6))
def test_a_deep_network_is_not_taken_for_one_that_writes_without_a_graph(seed):
    """Across its kinks differences of single precision are far from derivatives."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*buffers")
        found(ClipR(1.0), Deep(seed), steps=2)
