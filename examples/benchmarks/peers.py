"""What a hypergradient costs with other libraries, beside ours.

One log-L2 strength is tuned on two networks, trained by SGD with momentum: one hypergradient every
10 steps, through the last step alone (K = 1) or through all ten (K = 10). Every row is interleaved
in one process with plain training that has weight decay inside the optimizer; the number is the
median of the ratios of their times, in brackets the peak memory in MiB above that of data,
parameters and libraries. Ours runs inside lightning.Trainer and is compared with a Trainer; the
others run in a bare loop and are compared with a bare loop.

Each library is used as its documentation shows, with what makes it faster: no copy of the network,
and in the steps that are not differentiated (nine of ten with K = 1) weight decay inside the
optimizer. Only betty has L2 as a term of the loss in every step: its engine calls one training_step
for all purposes.

Before anything is timed, the hypergradients of all are compared with ours, in float64 on a small
network.

    pip install -e ".[examples,peers]"
    python examples/benchmarks/peers.py
    python examples/benchmarks/peers.py --quick

What cannot be installed is listed with the reason. Two need a hand: betty-ml 0.2.1 declares that it
does not support Python 3.11, yet runs there (pip install --ignore-requires-python --no-deps
betty-ml==0.2.1); hypertorch, whose module is called hypergrad, is not on PyPI, where its names
belong to other projects (pip install git+https://github.com/prolearner/hypertorch).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from _common import (
    ARCHITECTURES,
    LEARNING_RATE,
    MOMENTUM,
    WEIGHT_DECAY,
    Architecture,
    Limited,
    LitPlain,
    LitTuned,
    Stepper,
    Table,
    compare,
    describe,
    environment,
    fit,
    make_data,
    memory_problem,
    mlp,
    parse,
    peak_memory,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo import T1T2, OnlineHPOCallback, UnrollK
from lightning_hpo.estimators import Estimator

EVERY = 10


class Problem:
    """A network, the logarithm of its L2 strength, and held-out batches.

    Args:
        net: The network.
        held_out: Batches, repeated.
        moves: Whether λ is updated.
    """

    def __init__(self, net: nn.Module, held_out: list[list[Tensor]], moves: bool = True) -> None:
        self.net = net
        self.held_out = itertools.cycle(held_out)
        self.rho = torch.tensor(WEIGHT_DECAY).log().requires_grad_()
        self.optimizer = torch.optim.Adam([self.rho], lr=0.01 if moves else 0.0)
        self.hypergradients: list[float] = []
        self._names = [name for name, _ in net.named_parameters()]

    @property
    def strength(self) -> float:
        """λ as a number."""
        return float(self.rho.detach().exp())

    def penalty(self, parameters: Iterable[Tensor]) -> Tensor:
        """Returns ½ λ ‖w‖² over all weights; biases are left out."""
        return 0.5 * self.rho.exp() * sum(w.square().sum() for w in parameters if w.dim() > 1)

    def loss(self, batch: list[Tensor], parameters: list[Tensor] | None = None) -> Tensor:
        """Returns the cross-entropy, at other parameters where these are given."""
        x, y = batch[:2]
        if parameters is None:
            return F.cross_entropy(self.net(x), y)
        values = dict(zip(self._names, parameters, strict=True))
        return F.cross_entropy(torch.func.functional_call(self.net, values, (x,)), y)

    def update(self, hypergradient: Tensor) -> None:
        """Moves λ."""
        self.hypergradients.append(float(hypergradient))
        self.rho.grad = hypergradient.detach()
        self.optimizer.step()

    def sgd(self, *, decay: bool = True) -> torch.optim.SGD:
        """Returns the optimizer of the network, whose weight decay spares the biases."""
        weights = [p for p in self.net.parameters() if p.dim() > 1]
        biases = [p for p in self.net.parameters() if p.dim() <= 1]
        groups = [
            {"params": weights, "weight_decay": self.strength if decay else 0.0},
            {"params": biases, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, LEARNING_RATE, momentum=MOMENTUM)


Training = Callable[[Problem, Iterable[Any], int], None]


def train_plain(problem: Problem, batches: Iterable[Any], k: int) -> None:
    """Weight decay inside the optimizer."""
    optimizer = problem.sgd()
    for batch in batches:
        optimizer.zero_grad()
        problem.loss(batch).backward()
        optimizer.step()


def train_in_loss(problem: Problem, batches: Iterable[Any], k: int) -> None:
    """L2 as a term of the loss, written by hand."""
    optimizer = problem.sgd(decay=False)
    problem.rho.requires_grad_(False)
    for batch in batches:
        optimizer.zero_grad()
        (problem.loss(batch) + problem.penalty(problem.net.parameters())).backward()
        optimizer.step()


def train_floor(problem: Problem, batches: Iterable[Any], k: int) -> None:
    """The one-step hypergradient of L2 in closed form: −η λ ⟨w_t, g_V⟩."""
    _train_closed_form(problem, batches, scale=LEARNING_RATE, is_late=False)


def train_late(problem: Problem, batches: Iterable[Any], k: int) -> None:
    """What betty's one-step mode estimates: −λ ⟨w_{t+1}, g_V⟩."""
    _train_closed_form(problem, batches, scale=1.0, is_late=True)


def _train_closed_form(
    problem: Problem, batches: Iterable[Any], scale: float, is_late: bool
) -> None:
    optimizer = problem.sgd()
    weights = [p for p in problem.net.parameters() if p.dim() > 1]
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        problem.loss(batch).backward()
        is_due = step % EVERY == 0
        kept = [w.detach().clone() for w in weights] if is_due and not is_late else weights
        optimizer.step()
        if is_due:
            optimizer.zero_grad()
            g_v = torch.autograd.grad(problem.loss(next(problem.held_out)), weights)
            with torch.no_grad():
                pairs = zip(kept, g_v, strict=True)
                product = torch.stack([torch.dot(w.flatten(), g.flatten()) for w, g in pairs]).sum()
            problem.update(-scale * problem.strength * product)
            optimizer.param_groups[0]["weight_decay"] = problem.strength


class Unroller(ABC):
    """A library that keeps the graph of the steps it is told to."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abstractmethod
    def ordinary_step(self, batch: list[Tensor]) -> None:
        """Trains without a graph."""

    @abstractmethod
    def differentiable_step(self, batch: list[Tensor]) -> None:
        """Trains, and keeps the graph."""

    @abstractmethod
    def hypergradient(self, batch: list[Tensor]) -> Tensor:
        """Differentiates the held-out loss with respect to log λ, and lets go of the graph."""

    @classmethod
    def train(cls, problem: Problem, batches: Iterable[Any], k: int) -> None:
        """Trains, with one hypergradient through the last ``k`` steps after every 10."""
        unroller = cls(problem)
        for step, batch in enumerate(batches, 1):
            if (step - 1) % EVERY >= EVERY - k:
                unroller.differentiable_step(batch)
            else:
                unroller.ordinary_step(batch)
            if step % EVERY == 0:
                problem.update(unroller.hypergradient(next(problem.held_out)))


class Higher(Unroller):
    """``innerloop_ctx`` over the window, without a copy of the initial weights."""

    def __init__(self, problem: Problem) -> None:
        import higher

        super().__init__(problem)
        self._higher = higher
        self._optimizer = problem.sgd()
        self._window: Any = None

    def ordinary_step(self, batch: list[Tensor]) -> None:
        self._optimizer.zero_grad()
        self.problem.loss(batch).backward()
        self._optimizer.step()

    def differentiable_step(self, batch: list[Tensor]) -> None:
        if self._window is None:
            self._optimizer.zero_grad()
            self._optimizer.param_groups[0]["weight_decay"] = 0.0
            self._window = self._higher.innerloop_ctx(
                self.problem.net, self._optimizer, copy_initial_weights=False
            )
            self._net, self._steps = self._window.__enter__()
        x, y = batch[:2]
        loss = F.cross_entropy(self._net(x), y) + self.problem.penalty(self._net.parameters())
        self._steps.step(loss)

    def hypergradient(self, batch: list[Tensor]) -> Tensor:
        x, y = batch[:2]
        loss = F.cross_entropy(self._net(x), y)
        (result,) = torch.autograd.grad(loss, [self.problem.rho])
        with torch.no_grad():
            for p, value in zip(self.problem.net.parameters(), self._net.parameters(), strict=True):
                p.copy_(value)
        for group, states in zip(self._optimizer.param_groups, self._steps.state, strict=True):
            for i, p in enumerate(group["params"]):
                buffer = states[i]["momentum_buffer"].detach()
                self._optimizer.state[p]["momentum_buffer"] = buffer
        self._window.__exit__(None, None, None)
        del self._net, self._steps
        self._window = None
        self._optimizer.param_groups[0]["weight_decay"] = self.problem.strength
        return result


class TorchOpt(Unroller):
    """The functional optimizer: ``inplace=False`` in the window, else ``inplace=True``."""

    def __init__(self, problem: Problem) -> None:
        import torchopt

        super().__init__(problem)
        self._torchopt = torchopt
        self._optimizer = torchopt.sgd(LEARNING_RATE, MOMENTUM, moment_requires_grad=True)
        self._parameters = tuple(p.detach().requires_grad_() for p in problem.net.parameters())
        self._state = self._optimizer.init(self._parameters)
        self._settle()

    def ordinary_step(self, batch: list[Tensor]) -> None:
        parameters = self._parameters
        grads = torch.autograd.grad(self.problem.loss(batch, list(parameters)), parameters)
        with torch.no_grad():
            decayed = [(g, p) for g, p in zip(grads, parameters, strict=True) if p.dim() > 1]
            torch._foreach_add_(*map(list, zip(*decayed, strict=True)), alpha=self.problem.strength)
            updates, self._state = self._optimizer.update(
                grads, self._state, params=parameters, inplace=True
            )
            self._torchopt.apply_updates(parameters, updates, inplace=True)

    def differentiable_step(self, batch: list[Tensor]) -> None:
        parameters = self._parameters
        loss = self.problem.loss(batch, list(parameters)) + self.problem.penalty(parameters)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        updates, self._state = self._optimizer.update(
            grads, self._state, params=parameters, inplace=False
        )
        self._parameters = self._torchopt.apply_updates(parameters, updates, inplace=False)

    def hypergradient(self, batch: list[Tensor]) -> Tensor:
        loss = self.problem.loss(batch, list(self._parameters))
        (result,) = torch.autograd.grad(loss, [self.problem.rho])
        self._settle()
        return result

    def _settle(self) -> None:
        """Cuts parameters and state off the graph, as ``torchopt.stop_gradient`` does."""
        self._torchopt.stop_gradient((self._parameters, self._state))


class HyperTorch(Unroller):
    """``reverse_unroll`` over its own differentiable ``Momentum``."""

    def __init__(self, problem: Problem) -> None:
        from hypergrad.diff_optimizers import Momentum
        from hypergrad.hypergradients import reverse_unroll

        super().__init__(problem)
        self._reverse_unroll = reverse_unroll
        self._feed: list[Any] = []

        def loss(parameters: list[Tensor], hparams: list[Tensor], batch: list[Tensor]) -> Tensor:
            return problem.loss(batch, parameters) + problem.penalty(parameters)

        feed = iter(self._feed.pop, None)
        self._step = Momentum(loss, LEARNING_RATE, MOMENTUM, data_or_iter=feed)
        self._optimizer = problem.sgd()
        self._values: list[Tensor] | None = None

    def ordinary_step(self, batch: list[Tensor]) -> None:
        self._optimizer.zero_grad()
        self.problem.loss(batch).backward()
        self._optimizer.step()

    def differentiable_step(self, batch: list[Tensor]) -> None:
        if self._values is None:
            self._optimizer.zero_grad()
            own = list(self.problem.net.parameters())
            state = self._optimizer.state
            buffers = [
                state[p]["momentum_buffer"] if p in state else torch.zeros_like(p) for p in own
            ]
            self._values = [*own, *buffers]
        self._feed.append(batch)
        self._values = self._step(self._values, [self.problem.rho])

    def hypergradient(self, batch: list[Tensor]) -> Tensor:
        assert self._values is not None
        own = list(self.problem.net.parameters())
        values, buffers = self._values[: len(own)], self._values[len(own) :]
        (result,) = self._reverse_unroll(
            values, [self.problem.rho], lambda p, _: self.problem.loss(batch, p), set_grad=False
        )
        with torch.no_grad():
            torch._foreach_copy_(own, values)
        for p, buffer in zip(own, buffers, strict=True):
            self._optimizer.state[p]["momentum_buffer"] = buffer.detach()
        self._values = None
        self._step.curr_loss = None
        self._optimizer.param_groups[0]["weight_decay"] = self.problem.strength
        return result


def train_betty(problem: Problem, batches: Iterable[Any], k: int) -> None:
    """An ``Engine`` of two problems, the upper one with one parameter, log λ.

    K = 1 is ``ImplicitProblem`` with ``type="darts"``, finite differences; K = 10 is
    ``IterativeProblem``, cut off its past at the start of every window.
    """
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem, IterativeProblem

    logging.getLogger("betty").setLevel(logging.ERROR)
    logging.disable(logging.INFO)

    class Strength(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rho = nn.Parameter(problem.rho.detach().clone())

        def forward(self) -> Tensor:
            return self.rho.exp()

    def penalty(strength: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        return 0.5 * strength * sum(w.square().sum() for w in parameters if w.dim() > 1)

    class Upper(ImplicitProblem):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            return F.cross_entropy(self.lower(batch[0]), batch[1])

        def grad_callback(self) -> None:
            problem.hypergradients.append(float(self.module.rho.grad))

    class Lower(ImplicitProblem):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            loss = F.cross_entropy(self.module(batch[0]), batch[1])
            return loss + penalty(self.upper(), self.module.parameters())

    class UnrolledLower(IterativeProblem):
        # Version 0.2.1 reads this attribute without having set it, and makes its differentiable
        # optimizer twice, the second time from the first.
        _fp16 = False

        def patch_optimizer(self) -> None:
            if isinstance(self.optimizer, torch.optim.SGD):
                super().patch_optimizer()

        def initialize_optimizer_state(self) -> None:
            pass

        def forward(self, x: Tensor) -> Tensor:
            return self.fmodule(self.params, self.buffers, x)

        def training_step(self, batch: list[Tensor]) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            return loss + penalty(self.upper(), self.params)

        def on_inner_loop_start(self) -> None:
            self.params = tuple(p.detach().requires_grad_() for p in self.params)
            for state in self.optimizer.state:
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"] = state["momentum_buffer"].detach()

    strength = Strength()
    rate = problem.optimizer.param_groups[0]["lr"]
    unrolled = k > 1
    upper = Upper(
        name="upper",
        config=Config(type="darts", retain_graph=True, first_order=not unrolled),
        module=strength,
        optimizer=torch.optim.Adam(strength.parameters(), lr=rate),
        train_data_loader=Repeated(problem),
    )
    lower = (UnrolledLower if unrolled else Lower)(
        name="lower",
        config=Config(type="darts", unroll_steps=EVERY, retain_graph=unrolled),
        module=problem.net,
        optimizer=torch.optim.SGD(problem.net.parameters(), LEARNING_RATE, momentum=MOMENTUM),
        train_data_loader=Feed(batches),
    )
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    engine = Engine(
        config=EngineConfig(train_iters=10**9),
        problems=[upper, lower],
        dependencies=dependencies,
    )
    with contextlib.suppress(NoMoreBatches):
        engine.run()


class NoMoreBatches(Exception):
    """Ends betty's engine, which takes the end of its data for the end of an epoch."""


class Feed:
    """The training batches as betty can take them."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Any:
        yield from self._batches
        raise NoMoreBatches


class Repeated:
    """The held-out batches as an iterable."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __iter__(self) -> Any:
        return self._problem.held_out


# --------------------------------------------------------------------------------------------------
# Which of them are here
# --------------------------------------------------------------------------------------------------

LIBRARIES: dict[str, tuple[str, str, Training]] = {
    "higher": ("higher", "higher", Higher.train),
    "torchopt": ("torchopt", "torchopt", TorchOpt.train),
    "hypertorch reverse_unroll": ("hypertorch", "hypergrad.diff_optimizers", HyperTorch.train),
    "betty": ("betty-ml", "betty.engine", train_betty),
}


def find_libraries() -> tuple[dict[str, Training], dict[str, str]]:
    """Imports the libraries; returns those that are here, and why the others are not."""
    found, missing = {}, {}
    for name, (distribution, module, train) in LIBRARIES.items():
        try:
            importlib.import_module(module)
        except Exception as error:
            missing[name] = describe(error)
            continue
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "from source"
        found[f"{name} {version}"] = train
    return found, missing


# --------------------------------------------------------------------------------------------------
# Agreement
# --------------------------------------------------------------------------------------------------


def ours(k: int) -> Estimator:
    """Makes our estimator for K = 1 or 10."""
    return T1T2() if k == 1 else UnrollK(k)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return mlp(16)


def our_hypergradients(k: int, data: list[list[Tensor]], count: int) -> list[float]:
    """Runs ``count`` windows with λ at rest."""
    module = LitTuned(small_network(), l2="model")
    callback = OnlineHPOCallback(
        ours(k),
        optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0),
        every_n_steps=EVERY,
        dataloader=data[:1],
        derivatives="reverse",
    )
    fit(module, Limited(data, (count * EVERY,), lambda: 0), [callback])
    return [float(record.hypergradients["l2"]) for record in callback.history]


def their_hypergradients(
    train: Training, k: int, data: list[list[Tensor]], count: int
) -> list[float]:
    """Runs ``count`` windows with λ at rest."""
    problem = Problem(small_network(), data[:1], moves=False)
    train(problem, Limited(data, (count * EVERY,), lambda: 0), k)
    return problem.hypergradients


def agreement(train: Training, k: int, data: list[list[Tensor]], count: int = 3) -> str:
    """Returns the largest relative difference to ours."""
    try:
        theirs = their_hypergradients(train, k, data, count)
    except Exception as error:
        return f"failed ({describe(error)})"
    remark = ""
    if train is train_betty and k == 1:
        reference = their_hypergradients(train_late, k, data, count)
        remark = " to −λ⟨w_{t+1}, g_V⟩, its estimate, which leaves the step size out"
    else:
        reference = our_hypergradients(k, data, count)
    worst = max(abs(a - b) / abs(b) for a, b in zip(theirs, reference, strict=True))
    return f"{worst:.0e}{remark}"


def print_agreement(libraries: dict[str, Training]) -> None:
    """Compares all with ours, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        data = make_data(20, 200)
        print("\nlargest relative difference of the hypergradients to ours, float64, small network")
        for name, train in {"hand-written floor": train_floor, **libraries}.items():
            lengths = (1,) if train is train_floor else (1, EVERY)
            parts = [f"K={k}: {agreement(train, k, data)}" for k in lengths]
            print(f"{name:38}{', '.join(parts)}", flush=True)
    finally:
        torch.set_default_dtype(torch.float32)


# --------------------------------------------------------------------------------------------------
# Time and memory
# --------------------------------------------------------------------------------------------------


class Bench:
    """Measures the rows of one network."""

    def __init__(self, architecture: Architecture, options: Any) -> None:
        self.architecture = architecture
        self.options = options
        self.data = [
            [t.to(options.device) for t in batch] for batch in make_data(architecture.batch_size)
        ]

    def loop(self, train: Training, k: int, net: nn.Module | None = None) -> Callable[[Any], None]:
        """Returns the training in a bare loop."""
        torch.manual_seed(0)
        net = (self.architecture.make() if net is None else net).to(self.options.device)
        problem = Problem(net, self.data)
        return lambda batches: train(problem, batches, k)

    def trainer(
        self, k: int, derivatives: str = "auto", net: nn.Module | None = None
    ) -> Callable[[Any], None]:
        """Returns our training, or with k = 0 the Trainer without the callback."""
        torch.manual_seed(0)
        net = self.architecture.make() if net is None else net
        if k == 0:
            module: LitPlain = LitPlain(net)
            callbacks = []
        else:
            module = LitTuned(net, l2="model")
            callbacks = [OnlineHPOCallback(ours(k), every_n_steps=EVERY, derivatives=derivatives)]
        device, size = self.options.device, self.architecture.batch_size
        return lambda batches: fit(module, batches, callbacks, device, size)

    def stepper(self, train: Callable[[Any], None]) -> Stepper:
        """Starts a training."""
        return Stepper(train, self.data, self.options.device, self.options.threads)

    def ratio(self, train: Training | str, k: int) -> str:
        """Returns the ratio to plain training (a string: our derivatives, in the Trainer)."""

        def start() -> tuple[Stepper, Stepper]:
            if isinstance(train, str):
                both = self.trainer(0), self.trainer(k, train)
            else:
                both = self.loop(train_plain, k), self.loop(train, k)
            return self.stepper(both[0]), self.stepper(both[1])

        starts, rounds = (1, 3) if self.options.quick else (3, 5)
        try:
            timing = compare(start, EVERY, rounds, warmup=2 * EVERY, starts=starts)
        except Exception as error:
            return f"failed: {describe(error)}"
        return f"{timing.ratio:.2f}"

    def memory(self, train: Training | str, k: int) -> str:
        """Returns the peak in steady state."""
        if problem := memory_problem(self.options.device):
            return problem

        def prepare(is_warmup: bool) -> Callable[[Any], None]:
            tiny = mlp(8) if is_warmup and self.architecture.make is mlp else None
            if isinstance(train, str):
                return self.trainer(k, train, tiny)
            return self.loop(train, k, tiny)

        peaks = peak_memory(prepare, self.data, (11, 31), self.options.device, self.options.threads)
        return peaks if isinstance(peaks, str) else f"{peaks[-1]:.0f}"


Rows = dict[str, tuple[Training | str, tuple[int, ...]]]


def list_rows(libraries: dict[str, Training]) -> Rows:
    """Lists the trainings of a table, with their K."""
    return {
        "plain": (train_plain, (1,)),
        "plain, L2 as a term of the loss": (train_in_loss, (1,)),
        "hand-written floor": (train_floor, (1,)),
        **{library: (train, (1, EVERY)) for library, train in libraries.items()},
        "ours: T1T2, UnrollK(10)": ("auto", (1, EVERY)),
        "ours, finite differences": ("finite_difference", (1, EVERY)),
    }


def measure_memory(bench: Bench, rows: Rows) -> dict[str, list[str]]:
    """Returns the peaks by row."""
    memory = {row: [bench.memory(t, k) for k in ks] for row, (t, ks) in rows.items()}
    return {**memory, "plain Trainer": [bench.memory("auto", 0)]}


def measure_model(
    name: str, bench: Bench, rows: Rows, memory: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Prints the table of one network; returns the ratios by row."""
    print(f"\n{name}: ratio to plain training, peak MiB above data and parameters")
    table = Table({"": -38, "K=1": 8, "MiB": 7, "K=10": 10, "MiB ": 7})
    table.print_row("plain Trainer", "", memory["plain Trainer"][0])
    ratios = {}
    for row, (train, ks) in rows.items():
        ratios[row] = [bench.ratio(train, k) for k in ks]
        cells = [cell for pair in zip(ratios[row], memory[row], strict=True) for cell in pair]
        table.print_row(row, *cells)
    return ratios


def plot(results: dict[str, dict[str, list[str]]], options: Any) -> None:
    """Draws the ratios: a line of pictures per network, a column per K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(dict.fromkeys(row for cells in results.values() for row in cells))[::-1]
    figure, axes = pyplot.subplots(
        len(results), 2, figsize=(10, 0.7 + 2.7 * len(results)), sharey=True, squeeze=False
    )
    for line, (name, cells) in zip(axes, results.items(), strict=True):
        for column, (ax, k) in enumerate(zip(line, (1, EVERY), strict=True)):
            for y, row in enumerate(rows):
                ratio = next(iter(cells.get(row, [])[column:]), "")
                if not ratio or ratio.startswith("failed"):
                    continue
                color = "tab:orange" if row.startswith("ours") else "tab:blue"
                ax.barh(y, float(ratio), color=color)
                ax.annotate(ratio, (float(ratio), y), (3, -3), textcoords="offset points", size=8)
            ax.axvline(1.0, color="black", linewidth=0.8)
            ax.set_yticks(range(len(rows)), rows, fontsize=8)
            ax.set_title(f"{name}, K = {k}", fontsize=10)
            ax.margins(x=0.12)
            ax.tick_params(axis="x", labelsize=8)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="x", alpha=0.3)
    figure.supxlabel("time per step / plain training", fontsize=9)
    figure.tight_layout()
    figure.savefig(options.output, dpi=110)
    print(f"\nwrote {options.output.name}")


def main() -> None:
    options = parse(__doc__, __file__, ["mlp", "cnn"])
    print(environment(options.device, options.threads))
    libraries, missing = find_libraries()
    for name, reason in missing.items():
        print(f"not measured: {name} cannot be imported ({reason}); see the top of this script")
    models = options.model or (["mlp"] if options.quick else ["mlp", "cnn"])
    benches = {name: Bench(ARCHITECTURES[name], options) for name in models}
    rows = list_rows(libraries)
    # The memory of all first: its child processes must come before any computation here, which
    # leaves free blocks behind for them to use.
    memory = {name: measure_memory(bench, rows) for name, bench in benches.items()}
    print_agreement(libraries)
    results = {
        name: measure_model(name, bench, rows, memory[name]) for name, bench in benches.items()
    }
    plot(results, options)


if __name__ == "__main__":
    main()
