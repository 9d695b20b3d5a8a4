"""The problems that the tests share: small, smooth, seeded, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import combinations, product
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_hpo import L2Mixin, OnlineHPOCallback, named_hyperparameters
from lightning_hpo.regularizers import Penalty

STEPS = 10
BATCH = 8


def pairwise(**axes: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by so many combinations that any two values of different axes meet.

    Args:
        axes: The values of each parameter; a dictionary has them by name.
    """
    named = [
        list(a.items()) if isinstance(a, dict) else [(str(v), v) for v in a] for a in axes.values()
    ]

    def pairs(combination: Sequence[int]) -> set[Any]:
        return set(combinations(enumerate(combination), 2))

    every = list(product(*(range(len(values)) for values in named)))
    left = set().union(*map(pairs, every))
    chosen = []
    while left:
        chosen.append(max(every, key=lambda combination: len(pairs(combination) & left)))
        left -= pairs(chosen[-1])
    found = [[values[i] for values, i in zip(named, c, strict=True)] for c in sorted(chosen)]
    return pytest.mark.parametrize(
        ",".join(axes),
        [pytest.param(*(v for _, v in c), id="-".join(name for name, _ in c)) for c in found],
    )


class Lion(torch.optim.Optimizer):
    """An elementwise optimizer from elsewhere (Chen et al. 2023, Algorithm 2).

        θ ← (1 − η w) θ − η sign(β₁ m + (1 − β₁) g),   m ← β₂ m + (1 − β₂) g

    With a sharpness c the sign is smoothed to tanh(c x).
    """

    elementwise = True

    def __init__(
        self,
        parameters: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        sharpness: float = math.inf,
    ) -> None:
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "sharpness": sharpness}
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = state["mean"].clone().mul_(beta1).add_(p.grad, alpha=1 - beta1)
                if group["sharpness"] == math.inf:
                    update = self.sign_(update)
                else:
                    update.mul_(group["sharpness"]).tanh_()
                p.add_(update, alpha=-group["lr"])
                state["mean"].mul_(beta2).add_(p.grad, alpha=1 - beta2)
        return loss

    def sign_(self, x: Tensor) -> Tensor:
        return x.sign_()


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.3}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.03}),
    "adamw": (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "lion": (Lion, {"lr": 0.02, "weight_decay": 0.1, "sharpness": 20.0}),
}

# Thresholds at which clipping acts in some steps and, by value, on some elements only.
CLIPPINGS: dict[str, dict[str, Any]] = {
    "unclipped": {},
    "norm": {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "norm"},
    "value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
}


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    kind, options = OPTIMIZERS[name]
    return kind(parameters, **options)


def frozen(raw: list[Tensor]) -> torch.optim.Optimizer:
    """A λ-optimizer that observes without moving: λ stays where a reference can follow."""
    return torch.optim.SGD(raw, lr=0.0)


def cosine(t: int) -> float:
    """The factor of the learning rate at step t under the schedule of :class:`Mlp`."""
    return (1 + math.cos(math.pi * t / (STEPS + 2))) / 2


def _draw(seed: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


TRAIN = _draw(1, 40)
VALID = _draw(2, 20)


def train_batch(t: int) -> list[Tensor]:
    """The batch of optimizer step t (from 0): the loader does not shuffle."""
    start = t * BATCH % len(TRAIN[0])
    return [part[start : start + BATCH] for part in TRAIN]


def train_loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*TRAIN), **{"batch_size": BATCH, **options})


def valid_loader(**options: Any) -> DataLoader[Any]:
    """One batch holds all held-out data, so that every T2 batch is the same up to its order."""
    return DataLoader(TensorDataset(*VALID), **{"batch_size": len(VALID[0]), **options})


class EachRank:
    """Each rank takes every n-th example, so that the ranks together see the whole batch."""

    def train_dataloader(self):
        world = self.trainer.world_size
        data = TensorDataset(*TRAIN)
        sampler = DistributedSampler(data, world, self.global_rank, shuffle=False)
        return DataLoader(data, batch_size=BATCH // world, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*VALID), batch_size=20 // self.trainer.world_size)


class Mlp(L2Mixin, pl.LightningModule):
    """A smooth classifier with L2, whose initial weights never change."""

    def __init__(
        self,
        optimizer: str = "sgd",
        *,
        granularity: str = "layer",
        inside_loss: bool = False,
        schedule: bool = True,
        raw: Sequence[float] | None = None,
        init: float = 0.05,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))
        self.optimizer_name = optimizer
        self.schedule = schedule
        self.inside_loss = inside_loss
        self.register_l2(init=init, granularity=granularity, inside_loss=inside_loss)
        if raw is not None:
            for h, value in zip(named_hyperparameters(self).values(), raw, strict=True):
                h.raw.fill_(value)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return loss + self.penalty() if self.inside_loss else loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.optimizer_name, self.parameters())
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class FineTuned(Mlp):
    """What BackboneFinetuning expects: the optimizer starts without the backbone."""

    def __init__(self) -> None:
        super().__init__("momentum", granularity="model")
        self.backbone = self.net[0]

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


class OnceTanh(torch.autograd.Function):
    """As fused kernels are: a backward of its own, which has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class L2SP(Penalty):
    """½ λ ‖w − w₀‖²: stay near where training started (Li et al. 2018)."""

    def constant(self, weight: Tensor) -> Tensor:
        return weight.detach().clone()

    def value(self, weight: Tensor, constant: Tensor) -> Tensor:
        return 0.5 * (weight - constant).square().sum()

    def gradient(self, weight: Tensor, constant: Tensor) -> Tensor:
        return weight - constant

    def hvp(self, weight: Tensor, u: Tensor, constant: Tensor) -> Tensor:
        return u


class MemoryLogger(Logger):
    """Keeps what is logged, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append((step, dict(metrics)))


_RECORDS: dict[int, dict[str, Any]] = {}


class Recorder:
    """Keeps what replays do where no walk comes by, so that it is not put back after them."""

    def __init__(self, **start: Any) -> None:
        _RECORDS[id(self)] = start

    def __getattr__(self, name: str) -> Any:
        try:
            return _RECORDS[id(self)][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        _RECORDS[id(self)][name] = value


class Stateful:
    """A loader that goes on within an epoch."""

    def __init__(self) -> None:
        self.batches = list(train_loader())
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.batches):
            self.position += 1
            is_last = self.position == len(self.batches)
            batch = self.batches[self.position - 1]
            if is_last:
                self.position = 0
            yield batch
            if is_last:
                return

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class StopAfter(pl.Callback):
    """Writes a checkpoint after a batch, and stops there."""

    def __init__(self, step: int, path: Any) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def make_trainer(steps: int = STEPS, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_steps": steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**defaults, **options})


def fit(
    model: pl.LightningModule,
    callback: pl.Callback | list[pl.Callback] | None = None,
    *,
    steps: int = STEPS,
    train: Any = None,
    valid: Any = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> pl.Trainer:
    """Trains for a number of optimizer steps; options go to the Trainer."""
    trainer = make_trainer(steps, callbacks=callback, **options)
    trainer.fit(
        model,
        train_loader() if train is None else train,
        valid_loader() if valid is None else valid,
        ckpt_path=ckpt_path,
    )
    return trainer


def observe(
    estimator: Any, model: pl.LightningModule, *, steps: int = STEPS, **options: Any
) -> OnlineHPOCallback:
    """Trains with frozen λ; ``callback`` options are recognized, the others go to the Trainer."""
    names = ("every_n_steps", "derivatives", "dataloader", "seed", "warmup_steps")
    own = {name: options.pop(name) for name in names if name in options}
    callback = OnlineHPOCallback(estimator, optimizer=frozen, **own)
    fit(model, callback, steps=steps, **options)
    return callback


def last_hypergradient(callback: OnlineHPOCallback) -> Tensor:
    return flat(callback.history[-1].hypergradients.values())


def validation_loss(model: Mlp) -> float:
    with torch.no_grad():
        return model.loss(VALID).item()


def truth(make: Callable[[], Mlp], callbacks: Sequence[pl.Callback] = (), **options: Any) -> Tensor:
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


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def weights(model: nn.Module) -> Tensor:
    return flat(model.parameters())


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()
