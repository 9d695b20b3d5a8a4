"""Every estimator in every way of training, held to brute force.

The truth is the *pulse*: the central difference of a whole ``trainer.fit`` in which λ is moved at
one step only. With d_s for step s, every estimator has a closed answer: T1T2 is d_{T-1}, UnrollK(K)
the sum of the last K, RTHO the sum of all, and ClipR(inf, decay=γ) is Σ γ^{T-1-s} d_s.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from cases import BATCH, TRAIN, VALID, Mlp, fit, flat, frozen, relative_error, valid_loader
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    GaussianNoiseMixin,
    Implicit,
    LabelSmoothing,
    OnlineHPOCallback,
    UnrollK,
    named_hyperparameters,
)

ROOT = Path(__file__).parent.parent
STEPS = 4
DAMPING = 3.0  # enough for a definite Hessian

ESTIMATORS: dict[str, Callable[[], Any]] = {
    "T1T2": T1T2,
    "UnrollK-forward": lambda: UnrollK(2, "forward"),
    "UnrollK-reverse": lambda: UnrollK(2, "reverse"),
    "ClipR": lambda: ClipR(math.inf, decay=0.5),
    "RTHO": lambda: ClipR(math.inf),
    "Implicit": lambda: Implicit(iterations=200, damping=DAMPING, tolerance=1e-12),
}

# How much of the pulse of each step, counted from the last one, an estimator sees.
WEIGHTS: dict[str, Callable[[int], float]] = {
    "T1T2": lambda age: float(age == 0),
    "UnrollK-forward": lambda age: float(age < 2),
    "UnrollK-reverse": lambda age: float(age < 2),
    "ClipR": lambda age: 0.5**age,
    "RTHO": lambda age: 1.0,
}


# ---------------------------------------------------------------------------------------- modules


class Plain(GaussianNoiseMixin, Mlp):
    """One λ that acts in the gradient, and one that acts in the loss, with random draws."""

    def __init__(self, optimizer: str = "momentum", **options: Any) -> None:
        super().__init__(optimizer, granularity="model", **options)
        self.register_noise(0.3, at="net.0")

    def on_train_start(self) -> None:
        torch.manual_seed(3)  # of the noise


class Smooth(Mlp):
    """Without random draws, which are others in another precision."""

    def __init__(self, init: float = 0.05) -> None:
        super().__init__("momentum", granularity="model", init=init)
        self.smooth = LabelSmoothing(0.2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.smooth(self.net(x), y)


class Tiny(Smooth):
    """Losses whose gradients half precision cannot hold unless they are scaled."""

    def __init__(self) -> None:
        super().__init__(init=5e-6)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return 1e-4 * super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return 1e-3 * self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e3, momentum=0.9)


class WarmUp(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.03, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) / 3)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Groups(Plain):
    def configure_optimizers(self) -> Any:
        first, second = self.net[0].parameters(), self.net[2].parameters()
        return torch.optim.SGD(
            [{"params": first, "lr": 0.2}, {"params": second, "momentum": 0.9, "nesterov": True}],
            lr=0.05,
            weight_decay=0.01,
        )


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].bias.requires_grad_(False)
        self.net[2].weight.requires_grad_(False)


class NowAndThen(Plain):
    """The bias of the last layer gets a gradient in every other step only."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        hidden = self.net[1](self.net[0](x))
        bias = self.net[2].bias if batch_idx % 2 else None
        return F.cross_entropy(F.linear(hidden, self.net[2].weight, bias), y)


class Tied(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Linear(5, 4)
        self.back.weight = nn.Parameter(self.net[0].weight.detach().t().clone())
        self.forth = nn.Linear(4, 5)
        self.forth.weight = self.net[0].weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            nn.init.normal_(self.back.weight, std=0.5)
            nn.init.zeros_(self.back.bias)
            nn.init.zeros_(self.forth.bias)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        x = x + self.back(torch.tanh(self.forth(x)))
        return F.cross_entropy(self.net(x), y)


class Appearing(Plain):
    """The first layer trains from the third step on."""

    def __init__(self) -> None:
        super().__init__("adam")
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 2:
            self.net[0].requires_grad_(True)


class Recurrent(Plain):
    kind: type[nn.RNNBase] = nn.LSTM

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.rnn = self.kind(2, 3, num_layers=2, batch_first=True)
            self.head = nn.Linear(3, 4)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        hidden, _ = self.rnn(x.reshape(-1, 2, 2))
        return F.cross_entropy(self.net(self.head(hidden[:, -1])), y)


class RecurrentGRU(Recurrent):
    kind = nn.GRU


class Compiled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="aot_eager")


class Checkpointed(Plain):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        hidden = torch.utils.checkpoint.checkpoint(self.net[:2], x, use_reentrant=False)
        return F.cross_entropy(self.net[2](hidden), y)


class Attention(Plain):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        hidden = self.net[1](self.net[0](x)).reshape(1, 1, -1, 5)
        mixed = F.scaled_dot_product_attention(hidden, hidden, hidden)
        return F.cross_entropy(self.net[2](mixed[0, 0]), y)


# ---------------------------------------------------------------------------------------- regimes


@dataclass(frozen=True)
class Regime:
    """One way to train.

    Attributes:
        module: Makes the module.
        options: Go to the Trainer; a function, since plugins hold state.
        callback: Go to the callback.
        exact: The module and the options of the training that is differenced, where they are not
            those of the regime itself: half precision cannot be differenced.
        tolerance: Relative; half precision has 8 or 11 bits.
        least: What the hypergradients exceed, so that something is compared.
    """

    module: Callable[[], pl.LightningModule] = Plain
    options: Callable[[], dict[str, Any]] = dict
    callback: dict[str, Any] = field(default_factory=dict)
    exact: Regime | None = None
    tolerance: float = 1e-6
    least: float = 1e-6


def single() -> pl.LightningModule:
    return Smooth().float()


def loader(data: Any, size: int) -> DataLoader[Any]:
    x, y = data
    return DataLoader(TensorDataset(x.float(), y), batch_size=size)


def tiny() -> pl.LightningModule:
    return Tiny().float()


def precision(name: str, scale: float = 256.0) -> Callable[[], dict[str, Any]]:
    """A Trainer of that precision, with data in float32 as a user has them."""

    def options() -> dict[str, Any]:
        data = {"train": loader(TRAIN, BATCH), "valid": loader(VALID, len(VALID[0]))}
        if name != "16-mixed":
            return {"precision": name, **data}
        # "16-mixed" on the CPU silently means bf16 unless a scaler is given.
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return {"plugins": MixedPrecision(name, "cpu", scaler), **data}

    return options


def two_loaders() -> dict[str, Any]:
    x, y = VALID
    wrong = DataLoader(TensorDataset(torch.ones_like(x), y), batch_size=len(x))
    return {"valid": [wrong, valid_loader()]}


class Indexed(Plain):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)


REGIMES: dict[str, Regime] = {
    "plain": Regime(),
    "accumulation": Regime(options=lambda: {"accumulate_grad_batches": 2}),
    # Five batches per epoch: windows of 2, 2, 1, 2.
    "accumulation-partial": Regime(
        options=lambda: {"accumulate_grad_batches": 2, "steps": 3}, callback={"steps": 3}
    ),
    "clip-by-norm": Regime(options=lambda: {"gradient_clip_val": 0.3}),
    "clip-by-value": Regime(
        options=lambda: {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    ),
    "schedule-warm-up": Regime(WarmUp),
    "parameter-groups": Regime(Groups),
    "frozen-parameters": Regime(Frozen),
    "no-gradient-at-times": Regime(NowAndThen),
    "tied-weights": Regime(Tied),
    "unfrozen-later": Regime(Appearing),
    "LSTM": Regime(Recurrent),
    "GRU": Regime(RecurrentGRU),
    "torch-compile": Regime(Compiled, exact=Regime()),
    "activation-checkpointing": Regime(Checkpointed, exact=Regime()),
    "attention": Regime(Attention),
    "several-validation-loaders": Regime(
        Indexed, options=two_loaders, callback={"dataloader_idx": 1}
    ),
    "64-true": Regime(single, precision("64-true")),
    "32-true": Regime(single, precision("32-true"), exact=Regime(Smooth), tolerance=1e-4),
    "16-mixed": Regime(single, precision("16-mixed"), exact=Regime(Smooth), tolerance=0.01),
    "16-mixed, tiny gradients": Regime(
        tiny, precision("16-mixed", 2.0**16), exact=Regime(Tiny), tolerance=0.01, least=1e-11
    ),
    "bf16-mixed": Regime(single, precision("bf16-mixed"), exact=Regime(Smooth), tolerance=0.05),
    "bf16-true": Regime(single, precision("bf16-true"), exact=Regime(Smooth), tolerance=0.1),
}


# ------------------------------------------------------------------------------------ brute force


class Pulse(pl.Callback):
    """Moves one raw λ during one optimizer step."""

    def __init__(self, name: str, step: int, distance: float) -> None:
        self.name, self.step, self.distance = name, step, distance

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.raw = named_hyperparameters(pl_module)[self.name].raw
        self.base = self.raw.clone()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.raw.copy_(self.base + self.distance * (trainer.global_step == self.step))


def run(regime: Regime, callbacks: list[pl.Callback]) -> pl.LightningModule:
    options = regime.options()
    module = regime.module()
    fit(module, callbacks, steps=options.pop("steps", STEPS), **options)
    return module


def validation_loss(module: Any) -> float:
    module.eval()
    x, y = VALID
    with torch.no_grad():
        return float(module.validation_step((x.to(next(module.parameters()).dtype), y), 0))


@functools.cache
def pulses(key: str) -> dict[str, list[float]]:
    """Returns d_s for each λ and each step s."""
    regime = REGIMES[key].exact or REGIMES[key]
    steps = regime.options().get("steps", STEPS)
    epsilon = 1e-4
    result: dict[str, list[float]] = {}
    for name in named_hyperparameters(regime.module()):
        result[name] = []
        for step in range(steps):
            up, down = (
                validation_loss(run(regime, [Pulse(name, step, sign * epsilon)]))
                for sign in (1, -1)
            )
            result[name].append((up - down) / (2 * epsilon))
    return result


class Steps(pl.Callback):
    """Keeps the micro-batches of the last step and the random state in which each began."""

    def __init__(self) -> None:
        self.last: list[Any] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.last = []
        self.last.append((batch, batch_idx, torch.get_rng_state()))


@functools.cache
def implicit(key: str) -> dict[str, float]:
    """Solves −Bᵀ (H + damping)⁻¹ g_V with the dense Hessian of the last step's loss at θ_T."""
    regime = REGIMES[key].exact or REGIMES[key]
    kept = Steps()
    module = run(regime, [kept])
    theta = [p for p in module.parameters() if p.requires_grad]
    lam = list(named_hyperparameters(module).values())
    module.train()
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    raws = [h.raw.detach().clone().requires_grad_() for h in lam]
    for h, raw in zip(lam, raws, strict=True):
        h._buffers["raw"] = raw
    count = regime.options().get("accumulate_grad_batches", 1)
    loss = torch.zeros(())
    for batch, batch_idx, state in kept.last:
        torch.set_rng_state(state)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            loss = loss + module.training_step(batch, batch_idx) / count
    got = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
    taking_part = {id(p) for p, g in zip(theta, got, strict=True) if g is not None}
    loss = loss + sum(p.term() for p in module.gradient_penalties)
    active = [p for p in theta if id(p) in taking_part]
    gradient = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, active, create_graph=True)]
    )
    rows = [torch.autograd.grad(g, [*active, *raws], retain_graph=True) for g in gradient]
    hessian = torch.stack([flat(row[: len(active)]) for row in rows])
    mixed = torch.stack([flat(row[len(active) :]) for row in rows])
    module.eval()
    x, y = VALID
    g_v = flat(torch.autograd.grad(module.validation_step((x, y), 0), active))
    solution = torch.linalg.solve(hessian + DAMPING * torch.eye(len(hessian)), g_v)
    values = -(mixed.T @ solution)
    return dict(zip(named_hyperparameters(module), values.tolist(), strict=True))


def truth(regime: str, estimator: str) -> Tensor:
    if estimator == "Implicit":
        return torch.tensor(list(implicit(regime).values()))
    weight = WEIGHTS[estimator]
    return torch.tensor(
        [
            sum(weight(len(d) - 1 - s) * value for s, value in enumerate(d))
            for d in pulses(regime).values()
        ]
    )


# ------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("regime", REGIMES)
def test_hypergradients_equal_brute_force(regime: str, estimator: str) -> None:
    spec = REGIMES[regime]
    options = {name: v for name, v in spec.callback.items() if name != "steps"}
    make = ESTIMATORS[estimator]
    if estimator.startswith("UnrollK") and spec.callback.get("steps", STEPS) % 2:
        options["every_n_steps"] = spec.callback["steps"]
    callback = OnlineHPOCallback(make(), optimizer=frozen, **options)
    run(spec, [callback])
    found = flat(callback.history[-1].hypergradients.values())
    for value, expected in zip(found.double(), truth(regime, estimator), strict=True):
        assert relative_error(value, expected) < spec.tolerance
        assert expected.abs() > spec.least


# -------------------------------------------------------------------------- the table in the guide

# Row, the test that backs it, and what each estimator is called there.
OTHER_ROWS = {
    "resumed at the end of an epoch": "tests/test_resume.py::test_at_the_end_of_an_epoch",
    "resumed within an epoch (stateful loader)": (
        "tests/test_resume.py::test_within_an_epoch_with_a_stateful_loader"
    ),
    "DDP, two ranks": (
        "tests/test_distributed.py::test_two_ranks_equal_one_process_on_the_whole_batch"
    ),
    "`fully_shard`, two ranks (finite differences)": (
        "tests/test_sharded.py::test_two_shards_equal_one_process_on_the_whole_batch"
    ),
}
OTHER_NAMES = {
    "T1T2": {"T1T2"},
    "UnrollK-forward": {"forward"},
    "UnrollK-reverse": {"reverse"},
    "ClipR": {"ClipR"},
    "RTHO": {"RTHO"},
    "Implicit": {"Implicit"},
}


def table(ids: Iterable[str]) -> str:
    """Makes the table from the ids of the tests that there are."""
    found = {name: set[str]() for name in (*REGIMES, *OTHER_ROWS)}
    for test in ids:
        name, _, cell = test.rstrip("]").partition("[")
        if name.endswith("::test_hypergradients_equal_brute_force"):
            regime = max((r for r in REGIMES if cell.startswith(f"{r}-")), key=len)
            found[regime].add(cell.removeprefix(f"{regime}-"))
        for row, other in OTHER_ROWS.items():
            if name == other:
                parts = set(cell.split("-"))
                found[row] |= {e for e, names in OTHER_NAMES.items() if parts & names}
    lines = ["| | " + " | ".join(ESTIMATORS) + " |", "|---" * (len(ESTIMATORS) + 1) + "|"]
    for row, estimators in found.items():
        label = row.replace("-", " ") if row in REGIMES else row
        if "-true" in row or "-mixed" in row:
            name, _, rest = row.partition(",")
            label = f'`precision="{name}"`' + (f",{rest}" if rest else "")
        cells = " | ".join("✓" if e in estimators else "–" for e in ESTIMATORS)
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)


def collected() -> list[str]:
    files = ["tests/test_regimes.py", *{name.partition("::")[0] for name in OTHER_ROWS.values()}]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", *files]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in output.splitlines() if "::" in line]


@pytest.mark.slow
def test_the_table_in_the_guide_is_that_of_the_tests() -> None:
    found = table(collected())
    cells = [row.strip("|").split("|")[1:] for row in found.splitlines()[2:]]
    assert len(cells) == len(REGIMES) + len(OTHER_ROWS)
    assert all([cell.strip() for cell in row] == ["✓"] * len(ESTIMATORS) for row in cells)
    assert found in (ROOT / "examples" / "guide" / "at_scale.md").read_text()


if __name__ == "__main__":
    print(table(collected()))
