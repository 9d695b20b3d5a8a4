"""What the callback costs: time and memory against the same Trainer without it.

Each row trains the same network twice in one process, in alternating blocks of steps: with
OnlineHPOCallback, and without it and with weight decay inside the optimizer (SGD with momentum).
Noise, dropout layers and example weights are in both; only with the callback are they tuned. Both
are started several times. The ratio is the median of the pairs of blocks, and beside it stands
their middle half. One validation gradient every 10 steps costs a ratio of about 1.10 by itself.

Memory is the peak during training, above that of the training without the callback, in MiB and in
units of the size of the parameters. It is measured in a process of its own.

Around the table stand: the memory of long trainings; what one pass keeps for its backward; what a
penalty costs by itself; one example weight against 1 000; and the time that an idle step (no update
due) takes longer.

    python examples/benchmarks/overhead.py
    python examples/benchmarks/overhead.py --quick
    python examples/benchmarks/overhead.py --model mlp --threads 2
    python examples/benchmarks/overhead.py --device cuda
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from _common import (
    ARCHITECTURES,
    MIB,
    Architecture,
    Limited,
    LitPlain,
    LitTuned,
    Stepper,
    Table,
    Timing,
    activations,
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
from torch import nn

from lightning_hpo import T1T2, ClipR, OnlineHPOCallback, UnrollK
from lightning_hpo.estimators import Estimator

DROP_RATE = 0.2
SPANS = (11, 31)  # what is set up at the start is not counted
EXACT, DIFFERENCES = "reverse", "finite_difference"


@dataclass
class Case:
    """One row: what is tuned, how, and how often."""

    tuned: str
    method: str
    estimator: Callable[[], Estimator]
    every: int = 10
    derivatives: str = "auto"
    kinds: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def label(self) -> str:
        """Names the row in the picture."""
        suffix = {"auto": "", EXACT: ", exact", DIFFERENCES: ", differences"}[self.derivatives]
        return f"{self.method} every {self.every}: {self.tuned}{suffix}"


TIED = {"l2": "model"}
LAYERS = {"l2": "layer"}
IN_LOSS = {"l2": "loss"}
NOISE = {"l2": "model", "noise": True}
DROPOUT = {"dropout": True}


def cases() -> list[Case]:
    """Lists the rows of one model."""
    clip, unroll = partial(ClipR, 20.0), partial(UnrollK, 10)
    stride = partial(ClipR, 20.0, stride=10)
    noisy = "L2 + input and hidden noise"
    return [
        Case("L2", "T1T2", T1T2, kinds=TIED, quick=True),
        Case("L2 per layer", "T1T2", T1T2, kinds=LAYERS, quick=True),
        Case("L2 in the loss", "T1T2", T1T2, kinds=IN_LOSS),
        Case(noisy, "T1T2", T1T2, 10, DIFFERENCES, NOISE, quick=True),
        Case(noisy, "T1T2", T1T2, 10, EXACT, NOISE, quick=True),
        Case("dropout", "T1T2", T1T2, kinds=DROPOUT),
        Case("L2", "T1T2", T1T2, 1, kinds=TIED),
        Case("L2", "ClipR", clip, 1, DIFFERENCES, TIED, quick=True),
        Case("L2", "ClipR", clip, 1, EXACT, TIED, quick=True),
        Case("L2", "ClipR, stride 5", partial(ClipR, 20.0, stride=5), 5, kinds=TIED),
        Case("L2", "ClipR, stride 10", stride, 10, EXACT, TIED, quick=True),
        Case("L2", "ClipR, stride 10", stride, 10, DIFFERENCES, TIED, quick=True),
        Case("L2 per layer", "ClipR, stride 10", stride, kinds=LAYERS),
        Case(noisy, "ClipR, stride 10", stride, kinds=NOISE),
        Case("dropout", "ClipR, stride 10", stride, kinds=DROPOUT),
        Case("L2", "UnrollK(10)", unroll, 10, EXACT, TIED, quick=True),
        Case("L2", "UnrollK(10)", unroll, 10, DIFFERENCES, TIED),
        Case("L2", "UnrollK(10), reverse", partial(UnrollK, 10, "reverse"), kinds=TIED),
        Case("L2 per layer", "UnrollK(10)", unroll, kinds=LAYERS),
        Case(noisy, "UnrollK(10)", unroll, kinds=NOISE),
        Case("dropout", "UnrollK(10)", unroll, kinds=DROPOUT),
    ]


def make_module(
    architecture: Architecture, kinds: dict[str, Any], *, is_tuned: bool
) -> LitPlain | LitTuned:
    """Makes the module that is tuned, or the one that it is compared with."""
    torch.manual_seed(0)
    kinds = dict(kinds) if is_tuned else {k: v for k, v in kinds.items() if k != "l2"}
    dropout = kinds.get("dropout", False)
    net = architecture.make(dropout=DROP_RATE) if dropout else architecture.make()
    if kinds.pop("noise", False):
        kinds["noise_at"] = architecture.hidden
    return LitTuned(net, **kinds) if kinds else LitPlain(net)


@dataclass
class Bench:
    """Measures the cases of one model."""

    architecture: Architecture
    options: Any
    plain: dict[str, list[float] | str] = field(default_factory=dict)

    @property
    def repeats(self) -> dict[str, int]:
        """How often the trainings are started, and how many pairs of blocks each start has."""
        return {"starts": 3, "rounds": 3} if self.options.quick else {"starts": 5, "rounds": 5}

    def data(self) -> list[Any]:
        """Makes the batches."""
        return make_data(self.architecture.batch_size)

    def trainer(self, module: LitPlain, case: Case | None) -> Callable[[Stepper | Limited], None]:
        """Returns the training of a module, with the callback where there is a case."""
        callbacks = []
        if case is not None:
            callbacks = [
                OnlineHPOCallback(
                    case.estimator(), every_n_steps=case.every, derivatives=case.derivatives
                )
            ]
        return lambda batches: fit(
            module, batches, callbacks, self.options.device, self.architecture.batch_size
        )

    def stepper(self, case: Case, *, is_tuned: bool) -> Stepper:
        """Starts a training."""
        module = make_module(self.architecture, case.kinds, is_tuned=is_tuned)
        return self.start(module, case if is_tuned else None)

    def start(self, module: LitPlain, case: Case | None = None) -> Stepper:
        """Starts the training of a module, with the callback where there is a case."""
        train = self.trainer(module, case)
        return Stepper(train, self.data(), self.options.device, self.options.threads)

    def time(self, case: Case, block: int = 10) -> Timing:
        """Interleaves a case with its baseline."""

        def start() -> tuple[Stepper, Stepper]:
            return self.stepper(case, is_tuned=False), self.stepper(case, is_tuned=True)

        return compare(start, block, warmup=2 * block, **self.repeats)

    def memory(self, case: Case, *, is_tuned: bool, spans: tuple[int, ...]) -> list[float] | str:
        """Returns the peaks of a case, or of its baseline."""

        def prepare(is_warmup: bool) -> Callable[[Limited], None]:
            architecture = replace(self.architecture)
            if is_warmup and architecture.make is mlp:
                architecture.make = partial(mlp, width=8)
            module = make_module(architecture, case.kinds, is_tuned=is_tuned)
            return self.trainer(module, case if is_tuned else None)

        return peak_memory(prepare, self.data(), spans, self.options.device, self.options.threads)

    def added_memory(self, case: Case, spans: tuple[int, ...] = SPANS) -> float | str:
        """Returns what a case adds to the peak of its baseline, in MiB."""
        key = str({k: v for k, v in case.kinds.items() if k != "l2"})
        if key not in self.plain:
            self.plain[key] = self.memory(case, is_tuned=False, spans=spans)
        plain, tuned = self.plain[key], self.memory(case, is_tuned=True, spans=spans)
        if isinstance(plain, str) or isinstance(tuned, str):
            return plain if isinstance(plain, str) else str(tuned)
        return tuned[-1] - plain[-1]


def chosen_cases(options: Any) -> list[Case]:
    """Lists the rows that are wanted."""
    return [case for case in cases() if case.quick or not options.quick]


def measure_memory(name: str, options: Any) -> dict[str, float | str]:
    """Returns what each case of a model adds, in MiB, by label."""
    bench = Bench(ARCHITECTURES[name], options)
    problem = memory_problem(options.device)
    return {c.label: problem or bench.added_memory(c) for c in chosen_cases(options)}


def measure_model(name: str, added: dict[str, float | str], options: Any) -> dict[str, float]:
    """Prints the table of one model; returns the ratios by label."""
    architecture = ARCHITECTURES[name]
    bench = Bench(architecture, options)
    size = sum(p.numel() * p.element_size() for p in architecture.make().parameters()) / MIB
    print(f"\n{name}: θ is {size:.2f} MiB, batches of {architecture.batch_size}")
    table = Table(
        {
            "tuned": -30,
            "method": -22,
            "every": 6,
            "derivatives": 19,
            "ratio": 8,
            "middle half": 14,
            "ms/step": 9,
            "+MiB": 9,
            "+θ": 7,
        }
    )
    ratios = {}
    for case in chosen_cases(options):
        cells = (case.tuned, case.method, str(case.every), case.derivatives)
        try:
            timing = bench.time(case)
        except Exception as error:
            table.print_row(*cells, f"  failed: {describe(error)}")
            continue
        ratios[case.label] = timing.ratio
        memory = added[case.label]
        table.print_row(
            *cells,
            f"{timing.ratio:.2f}",
            timing.spread,
            f"{timing.milliseconds:.2f}",
            *([f"  {memory}"] if isinstance(memory, str) else _memory_cells(memory, size)),
        )
    images = make_data(architecture.batch_size)[0][0]
    kept = activations(architecture.make(), images)
    print(f"one pass keeps {kept:.2f} MiB ({kept / size:.2f} θ) of activations for its backward")
    return ratios


def _memory_cells(added: float, size: float) -> list[str]:
    return [f"{added:.1f}", f"{added / size:.2f}"]


def print_long_memory(options: Any) -> None:
    """Shows that memory does not grow, on a network whose θ is about 1 MiB."""
    spans = (50, 150, 300) if options.quick else (200, 1000, 2000)
    bench = Bench(Architecture(partial(mlp, width=200), 20, []), options)
    print(f"\npeak MiB of a small MLP in the steps up to {', '.join(map(str, spans))}")
    for case in (
        Case("L2", "T1T2", T1T2, kinds=TIED),
        Case("L2", "ClipR", partial(ClipR, 20.0), 1, EXACT, TIED),
        Case("L2", "ClipR", partial(ClipR, 20.0), 1, DIFFERENCES, TIED),
        Case("L2", "UnrollK(10)", partial(UnrollK, 10), kinds=TIED),
    ):
        peaks = memory_problem(options.device) or bench.memory(case, is_tuned=True, spans=spans)
        if isinstance(peaks, str):
            text = peaks
        else:
            text = "  ".join(f"{p:7.2f}" for p in peaks) + f"   growth {peaks[-1] - peaks[-2]:+.2f}"
        print(f"{case.label:46}{text}", flush=True)


def print_example_weights(options: Any) -> None:
    """Compares one example weight with 1 000, T1T2 in both."""
    bench = Bench(ARCHITECTURES["mlp"], options)
    for every in (10, 1):
        one, many = (
            partial(
                bench.stepper,
                Case("examples", "T1T2", T1T2, every, kinds={"examples": n}),
                is_tuned=True,
            )
            for n in (1, 1000)
        )
        timing = compare(lambda a=one, b=many: (a(), b()), block=10, warmup=20, **bench.repeats)
        print(
            f"T1T2 every {every}, 1 000 example weights against 1 (MLP): {timing.ratio:.3f} "
            f"({timing.spread})",
            flush=True,
        )


def print_penalties(options: Any) -> None:
    """Compares penalties with weight decay in the optimizer, without the callback."""
    bench = Bench(ARCHITECTURES["mlp"], options)
    for label, kinds in {"in the gradient": TIED, "inside the loss": IN_LOSS}.items():

        def start(kinds: Any = kinds) -> tuple[Stepper, Stepper]:
            plain, penalized = (
                bench.start(make_module(bench.architecture, kinds, is_tuned=is_penalty))
                for is_penalty in (False, True)
            )
            return plain, penalized

        timing = compare(start, block=10, warmup=20, **bench.repeats)
        print(
            f"L2 {label} against weight decay in the optimizer, no callback (MLP): "
            f"{timing.ratio:.3f} ({timing.spread})",
            flush=True,
        )


def print_idle_steps(options: Any) -> None:
    """Compares steps without an update with those of a Trainer without the callback.

    The network is tiny, so that a step takes little else than Python.
    """
    architecture = Architecture(lambda: nn.Sequential(nn.Linear(784, 10)), 2, [])
    bench = Bench(architecture, options)
    never = 10**9
    block = 200 if options.quick else 1000
    for label, case in {
        "T1T2": Case("L2", "T1T2", T1T2, never, kinds=TIED),
        "ClipR, stride": Case("L2", "ClipR", partial(ClipR, 20.0, stride=never), never, kinds=TIED),
    }.items():
        for baseline, kinds in (
            ("weight decay in the optimizer", None),
            ("the same module without the callback", case.kinds),
        ):

            def start(case: Case = case, kinds: Any = kinds) -> tuple[Stepper, Stepper]:
                module = make_module(architecture, kinds or {}, is_tuned=kinds is not None)
                return bench.start(module), bench.stepper(case, is_tuned=True)

            timing = compare(start, block, warmup=50, **bench.repeats)
            extra = median(
                1e6 * (m - b) for b, m in zip(timing.baseline, timing.method, strict=True)
            )
            print(
                f"idle step of {label} against {baseline}: {extra:+.0f} µs "
                f"(of {1000 * timing.milliseconds:.0f} µs)",
                flush=True,
            )


def plot(results: dict[str, dict[str, float]], options: Any) -> None:
    """Draws the ratios of all models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(label for ratios in results.values() for label in ratios))[::-1]
    height = 0.8 / len(results)
    figure, axes = pyplot.subplots(figsize=(8.5, 1.2 + 0.34 * len(labels)))
    for i, (name, ratios) in enumerate(results.items()):
        rows = [(y, ratios[label]) for y, label in enumerate(labels) if label in ratios]
        axes.barh(
            [y + 0.4 - height * (i + 0.5) for y, _ in rows],
            [ratio for _, ratio in rows],
            height,
            label=name,
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("time per step / the same Trainer without the callback")
    axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.output, dpi=110)
    print(f"\nwrote {options.output.name}")


def main() -> None:
    options = parse(__doc__, __file__, list(ARCHITECTURES))
    print(environment(options.device, options.threads))
    models = options.model or (["mlp"] if options.quick else list(ARCHITECTURES))
    # The memory of all first: its child processes must come before any computation here, which
    # leaves free blocks behind for them to use.
    print_long_memory(options)
    added = {name: measure_memory(name, options) for name in models}
    results = {name: measure_model(name, added[name], options) for name in models}
    print()
    print_penalties(options)
    print_example_weights(options)
    print_idle_steps(options)
    plot(results, options)


if __name__ == "__main__":
    main()
