"""Parameters sharded over two CPU processes, against one process on the concatenated batch."""

import math
import os
import pickle
import queue
import re
import signal
import socket
import traceback
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from cases import BATCH, L2SP, TRAIN, VALID, flat, make_optimizer, make_trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    Hyperparameter,
    Implicit,
    L1Mixin,
    L2Mixin,
    OnlineHPOCallback,
    Positive,
    UnrollK,
)
from lightning_hpo.estimators import _reverse

# Parameters are gathered in streams of the device.
needs_streams = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="fully_shard of this version of torch does not run on CPUs",
)

RANKS = 2
RADIUS = 0.05
TIMEOUT = 120


@pytest.fixture(autouse=True)
def _timeout():
    """A hang is a failure."""

    def stop(*_):
        raise TimeoutError(f"{RANKS} ranks did not finish within {TIMEOUT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIMEOUT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def on_two_ranks(function):
    """Calls ``function`` in two forked processes; returns what it returns on each rank.

    ModelParallelStrategy launches scripts only, unless the processes exist already.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("fork")
    results = context.Queue()

    def work(rank):
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            WORLD_SIZE=str(RANKS),
            NODE_RANK="0",
            LOCAL_RANK=str(rank),
        )
        signal.alarm(0)
        try:
            # Plain bytes: tensors would be shared with a process that is about to end.
            results.put((rank, True, pickle.dumps(function())))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))

    processes = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    returned = {}
    try:
        while len(returned) < RANKS:
            try:
                rank, fine, value = results.get(timeout=1)
            except queue.Empty:
                assert all(p.is_alive() for p in processes), "a rank died"
                continue
            assert fine, value
            returned[rank] = pickle.loads(value)
    finally:
        for process in processes:
            process.join(5 if len(returned) == RANKS else 0)
            if process.is_alive():
                process.kill()
    return [returned[rank] for rank in range(RANKS)]


class Net(L2Mixin, L1Mixin, LightningModule):
    """A smooth classifier whose layers have odd numbers of rows: shards are uneven, some empty.

    λ act in the gradient (L2, L1), and in the loss: the scale of noise that comes with the data,
    the weight of a second term, and one that is differenced as a dropout rate would be.
    """

    def __init__(self, optimizer="momentum", kinds=("gradient", "loss"), head=True):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh())
            self.head = nn.Linear(3, 3)
            self.gate = nn.Linear(3, 1)
        self.optimizer_name = optimizer
        self.kinds = kinds
        self.trains_head = head
        if "gradient" in kinds:
            self.register_l2(init=0.05, granularity="layer")
            self.register_l1(init=0.01)
        if "auto" in kinds:
            self.register_l2(granularity="layer")
            self.register_l1()
        if "inside" in kinds:
            self.register_l2(init=0.05, inside_loss=True)
        if "loss" in kinds:
            self.sigma = Hyperparameter(0.3, Positive())
            self.second = Hyperparameter(0.5, Positive())
        if "differenced" in kinds:
            self.sigma = Hyperparameter(0.3, Positive(), difference_step=1e-5)
            self.second = Hyperparameter(0.5, Positive())

    def sharded_parts(self):
        return [self.net[0], self.net[2], self.head, self.gate, self.net]

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for part in self.sharded_parts():
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def outputs(self, x):
        hidden = self.net(x)
        return self.head(hidden), self.gate(hidden)

    def training_step(self, batch, batch_idx):
        x, y, noise = batch
        if not {"loss", "differenced"} & set(self.kinds):
            # The gate gets no gradient.
            return F.cross_entropy(self.outputs(x)[0], y)
        logits, gate = self.outputs(x + self.sigma() * noise)
        return F.cross_entropy(logits, y) + self.second() * gate.square().mean()

    def validation_step(self, batch, batch_idx):
        logits, gate = self.outputs(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.1 * gate.square().mean()

    def configure_optimizers(self):
        trained = [
            p for name, p in self.named_parameters() if self.trains_head or "head" not in name
        ]
        if self.optimizer_name == "muon":
            return torch.optim.Muon([p for p in trained if p.dim() == 2], lr=0.01)
        return make_optimizer(self.optimizer_name, trained)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(5)
        data = TensorDataset(*TRAIN, torch.randn(TRAIN[0].shape, generator=generator))
        world = self.trainer.world_size
        sampler = DistributedSampler(data, world, self.global_rank, shuffle=False)
        return DataLoader(data, batch_size=BATCH // world, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*VALID), batch_size=20 // self.trainer.world_size)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tune(estimator=None, lr=1.0, **options):
    """A callback whose λ-optimizer is linear: errors of the hypergradient are not normalized."""
    return OnlineHPOCallback(
        estimator, optimizer=lambda raw: torch.optim.SGD(raw, lr=lr), **options
    )


def fit(model, callback, *, sharded, ckpt_path=None, distributed_checkpoint=False, **options):
    """Trains, and returns the Trainer and the parameters that its optimizer moves."""
    if sharded:
        options["strategy"] = ModelParallelStrategy(
            RANKS, 1, save_distributed_checkpoint=distributed_checkpoint
        )
    trainer = make_trainer(
        callbacks=callback,
        devices=RANKS if sharded else 1,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    (optimizer,) = trainer.optimizers
    parameters = optimizer.param_groups[0]["params"]
    assert all(isinstance(p, DTensor) for p in parameters) == sharded
    return trainer, parameters


def outcome(callback, parameters):
    """The path of λ, the hypergradients, the norms of the tangents, and θ."""
    path = [list(record.values.values()) for record in callback.history]
    gradients = [flat(record.hypergradients.values()) for record in callback.history]
    theta = flat([full(p.detach()) for p in parameters])
    norms = [list((record.tangent_norms or {}).values()) for record in callback.history]
    return torch.tensor(path), torch.stack(gradients), torch.tensor(norms), theta


def train(estimator, *, sharded, optimizer="momentum", kinds=("gradient", "loss"), **options):
    own = {n: options.pop(n) for n in ("derivatives", "optimizer_hyperparameters") if n in options}
    callback = tune(estimator(), **own)
    _, parameters = fit(Net(optimizer, kinds), callback, sharded=sharded, **options)
    return outcome(callback, parameters)


def check(estimator, **options):
    """Two sharded ranks agree with each other, and with one process, exact or not."""
    options = {"max_steps": 6, **options}
    first, second = on_two_ranks(lambda: train(estimator, sharded=True, **options))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for derivatives in ("finite_difference", "reverse"):
        whole = train(estimator, sharded=False, derivatives=derivatives, **options)
        for a, b in zip(first, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    path, hypergradients, norms, _ = first
    if estimator is ESTIMATORS["ClipR"]:
        assert (norms.max() - RADIUS).abs() < 1e-6
    assert (path[-1] - path[0]).abs().max() > 1e-4
    assert hypergradients.abs().max() > 1e-4


ESTIMATORS = {
    "T1T2": T1T2,
    "gTgV": lambda: T1T2(scale_by_lr=False),
    # Some tangents reach the radius: the norm is over all shards.
    "ClipR": lambda: ClipR(RADIUS, decay=0.9),
    "forward": lambda: UnrollK(3, "forward"),
    "reverse": lambda: UnrollK(3, "reverse"),
    "RTHO": lambda: ClipR(math.inf),
    "Implicit": lambda: Implicit(iterations=3, damping=1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@needs_streams
def test_two_shards_equal_one_process_on_the_whole_batch(make, optimizer):
    check(make, optimizer=optimizer, gradient_clip_val=0.3)


@pytest.mark.parametrize(
    ("make", "options"),
    {
        "no-gradient": (lambda: ClipR(0.5), {"kinds": ("gradient",)}),
        "clip-by-value": (
            lambda: UnrollK(2, "reverse"),
            {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        ),
        "accumulation": (lambda: ClipR(0.5), {"accumulate_grad_batches": 2}),
        "generic-forward": (ESTIMATORS["forward"], {"optimizer": "rmsprop"}),
        "generic-reverse": (ESTIMATORS["reverse"], {"optimizer": "rmsprop"}),
        "declared-forward": (ESTIMATORS["forward"], {"optimizer": "lion"}),
        "declared-reverse": (ESTIMATORS["reverse"], {"optimizer": "lion"}),
        "neumann": (lambda: Implicit("neumann", iterations=3), {}),
        "options-forward": (lambda: ClipR(0.5), {"optimizer_hyperparameters": ["lr"]}),
        "options-reverse": (ESTIMATORS["reverse"], {"optimizer_hyperparameters": ["lr"]}),
        "differenced-forward": (ESTIMATORS["forward"], {"kinds": ("differenced",)}),
        "differenced-reverse": (ESTIMATORS["reverse"], {"kinds": ("differenced",)}),
        "auto-sgd": (T1T2, {"kinds": ("auto",)}),
        "auto-adam": (
            lambda: ClipR(0.5),
            {
                "kinds": ("auto",),
                "optimizer": "adam",
                "optimizer_hyperparameters": {"weight_decay": "auto"},
            },
        ),
        "restart": (lambda: UnrollK(3, "reverse", restart=True), {"optimizer": "adam"}),
        "validation-between-steps": (T1T2, {"val_check_interval": 1, "kinds": ("loss",)}),
    }.values(),
    ids=[
        "no-gradient",
        "clip-by-value",
        "accumulation",
        "generic-forward",
        "generic-reverse",
        "declared-forward",
        "declared-reverse",
        "neumann",
        "options-forward",
        "options-reverse",
        "differenced-forward",
        "differenced-reverse",
        "auto-sgd",
        "auto-adam",
        "restart",
        "validation-between-steps",
    ],
)
@needs_streams
def test_shards_in_other_settings(make, options):
    check(make, **options)


@needs_streams
def test_a_long_window_is_made_again_from_shards(monkeypatch):
    monkeypatch.setattr(_reverse, "KEPT_STEPS", 2)
    check(lambda: UnrollK(5, "reverse"), optimizer="adam", gradient_clip_val=0.3, max_steps=10)


class KeepsGradients(Net):
    """Its head is in no optimizer, so that its gradients add up."""

    def __init__(self):
        super().__init__(kinds=("loss",), head=False)
        self.seen = []

    def configure_optimizers(self):
        # After a validation step the module holds gathered parameters in their place.
        self.shards = [list(part.parameters()) for part in (self, self.head)]
        return super().configure_optimizers()

    def on_train_batch_start(self, batch, batch_idx):
        self.seen += [full(p.grad).clone() for p in self.shards[1] if p.grad is not None]

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.seen += [full(p.grad).clone() for p in self.shards[0]]


@pytest.mark.slow
@needs_streams
def test_the_callback_leaves_a_sharded_training_as_it_is():
    """Gradients included, also those that no optimizer ever clears."""

    def run():
        runs = []
        for callback in (None, tune(ClipR(0.5), lr=0.0), tune(T1T2(), lr=0.0)):
            model = KeepsGradients()
            _, parameters = fit(model, callback, sharded=True, val_check_interval=2)
            # 8 gradients at each of 10 steps; 2 before each step that follows no validation.
            assert len(model.seen) == 10 * 8 + 5 * 2
            runs.append(flat([*model.seen, *(full(p.detach()) for p in parameters)]))
        return runs

    for plain, *others in on_two_ranks(run):
        for other in others:
            torch.testing.assert_close(other, plain, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "distributed"),
    [(lambda: ClipR(0.5), True), (lambda: UnrollK(4, "forward"), False), (T1T2, True)],
    ids=["ClipR", "UnrollK", "T1T2"],
)
@needs_streams
def test_a_sharded_training_resumes_where_it_stopped(make, distributed, tmp_path):
    def run():
        common = {"sharded": True, "distributed_checkpoint": distributed}
        whole = tune(make())
        expected = outcome(whole, fit(Net("adam"), whole, **common)[1])
        trainer, _ = fit(Net("adam"), tune(make()), max_steps=5, **common)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        resumed = tune(make())
        model = Net("adam")
        _, parameters = fit(model, resumed, ckpt_path=tmp_path / "half.ckpt", **common)
        return expected, outcome(resumed, parameters)

    for expected, got in on_two_ranks(run):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.slow
@needs_streams
def test_auto_takes_finite_differences_and_says_so_once():
    def run():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(ESTIMATORS["ClipR"], sharded=True)
        return [str(w.message) for w in caught if "derivatives='auto'" in str(w.message)]

    for messages in on_two_ranks(run):
        assert len(messages) == 1
        assert "finite differences, because the parameters are sharded" in messages[0]


class Partly(Net):
    def sharded_parts(self):
        return [self.net[0]]


class Replicated(Net):
    def sharded_parts(self):
        return []


class NearTheStart(Net):
    def __init__(self):
        super().__init__(kinds=("gradient",))
        self.register_penalty(L2SP, 0.1, name="near")


class TensorParallel(Net):
    def configure_model(self):
        parallelize_module(self.net[0], self.device_mesh["tensor_parallel"], ColwiseParallel())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        pytest.param(
            lambda: Net("muon"),
            {},
            r"step of Muon may mix.*Use SGD, Adam.*If it moves each.*Muon\.elementwise = True",
            marks=pytest.mark.skipif(
                not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon"
            ),
        ),
        (lambda: Net(kinds=("inside",)), {}, r"inside_loss=True.*Register it without inside_loss"),
        (NearTheStart, {}, r"keeps constants of whole weights.*strategy='ddp'.*\(here 'near'\)"),
        (Net, {"derivatives": "reverse"}, r"derivatives='reverse'.*'finite_difference' or 'auto'"),
        (Net, {"derivatives": "forward"}, r"derivatives='forward'.*'finite_difference' or 'auto'"),
        (Partly, {}, r"6 of the 8 parameters .*\(net\.2\.weight is.*Apply fully_shard to"),
        (Replicated, {}, r"8 of the 8 parameters .*Apply fully_shard to the whole network"),
        (TensorParallel, {}, r"tensor parallelism over 2 processes.*tensor_parallel_size=1"),
    ],
    ids=[
        "matrix-valued",
        "inside-loss",
        "constants",
        "reverse",
        "forward",
        "partly",
        "replicated",
        "tensor-parallel",
    ],
)
def test_what_cannot_be_followed_is_refused(make, options, message):
    def run():
        model = make()
        sizes = (1, RANKS) if isinstance(model, TensorParallel) else (RANKS, 1)
        trainer = make_trainer(
            callbacks=tune(**options),
            devices=RANKS,
            strategy=ModelParallelStrategy(*sizes),
            use_distributed_sampler=False,
        )
        with pytest.raises(MisconfigurationException) as caught:
            trainer.fit(model)
        return trainer.global_step, str(caught.value)

    for steps, text in on_two_ranks(run):
        assert steps == 0
        assert re.search(message, text)


@needs_streams
def test_constants_of_sharded_weights_are_refused_without_the_callback_too():
    def run():
        trainer = make_trainer(
            devices=RANKS,
            strategy=ModelParallelStrategy(RANKS, 1),
            use_distributed_sampler=False,
        )
        with pytest.raises(MisconfigurationException) as caught:
            trainer.fit(NearTheStart())
        return trainer.global_step, str(caught.value)

    for steps, text in on_two_ranks(run):
        assert steps == 0
        assert "keeps constants of whole weights" in text
