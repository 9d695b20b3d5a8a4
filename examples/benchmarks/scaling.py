"""How the cost of the callback grows: with the number of λ, with the size of θ, with K.

Three sweeps on MLPs of three hidden layers. Time is the ratio to the same Trainer without the
callback, both interleaved in one process as in overhead.py (the median of the pairs of blocks);
memory is what the callback adds to the peak, in units of the size of θ.

 1. The number of λ: weights of 1 to 1 000 training examples. Reverse methods (T1T2, UnrollK) take
    them all at one price; ClipR carries one tangent each (here with stride 10).
 2. The number of parameters, with one L2 strength: 10⁴ to 10⁷, and 10⁸ with --large (which takes a
    quarter of an hour on one core, and 6 GiB).
 3. The window K of UnrollK, with one L2 strength and an update at the end of each window.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --quick
    python examples/benchmarks/scaling.py --large
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from _common import (
    MIB,
    Architecture,
    Table,
    describe,
    environment,
    memory_problem,
    mlp,
    parse,
)
from overhead import TIED, Bench, Case

from lightning_hpo import T1T2, ClipR, UnrollK

BATCH_SIZE = 100


@dataclass
class Point:
    """One measurement of a sweep."""

    sweep: str
    x: int
    width: int
    case: Case
    block: int = 10

    @property
    def line(self) -> str:
        """The line of the picture that it belongs to."""
        every = "" if self.sweep == "K" else f", every {self.case.every}"
        return self.case.method + every


def width_for(parameters: int) -> int:
    """Returns the width at which an MLP has about so many parameters: 2 w² + 797 w."""
    return max(1, round((math.sqrt(797**2 + 8 * parameters) - 797) / 4))


def points(options: Any) -> list[Point]:
    """Lists the measurements."""
    found = []
    counts = [1, 10, 100] if options.quick else [1, 3, 10, 30, 100, 300, 1000]
    for n in counts:
        for method, estimator in {
            "T1T2": T1T2,
            "UnrollK(10), reverse": partial(UnrollK, 10, "reverse"),
            "ClipR, stride 10": partial(ClipR, 20.0, stride=10),
        }.items():
            case = Case("example weights", method, estimator, 10, kinds={"examples": n})
            found.append(Point("number of λ", n, width_for(30_000), case))
    exponents = [4, 5, 6] if options.quick else [4, 5, 6, 7]
    for exponent in [*exponents, 8] if options.large else exponents:
        for method, estimator, every in (
            ("T1T2", T1T2, 10),
            ("ClipR", partial(ClipR, 20.0), 1),
            ("ClipR, stride 10", partial(ClipR, 20.0, stride=10), 10),
            ("UnrollK(10)", partial(UnrollK, 10), 10),
        ):
            case = Case("L2", method, estimator, every, kinds=TIED)
            found.append(Point("number of parameters", 10**exponent, width_for(10**exponent), case))
    for k in [1, 5, 20] if options.quick else [1, 2, 5, 10, 20, 50, 100]:
        for mode in ("forward", "reverse"):
            case = Case("L2", f"UnrollK, {mode}", partial(UnrollK, k, mode), k, kinds=TIED)
            block = k * math.ceil(10 / k)
            found.append(Point("K", k, width_for(300_000), case, block))
    return found


def measure(options: Any) -> list[tuple[Point, float, float | None]]:
    """Prints the table; returns each point with its ratio and its added memory in θ."""
    chosen = points(options)
    problem = memory_problem(options.device)
    benches: dict[int, Bench] = {}

    def bench(point: Point) -> Bench:
        make: Callable[..., Any] = partial(mlp, width=point.width)
        return benches.setdefault(point.width, Bench(Architecture(make, BATCH_SIZE, []), options))

    def size(point: Point) -> float:
        made = bench(point).architecture.make()
        return sum(p.numel() * p.element_size() for p in made.parameters()) / MIB

    # The memory of all first: its child processes must come before any computation here.
    added = [
        problem or bench(point).added_memory(point.case, (point.block + 1, 2 * point.block + 1))
        for point in chosen
    ]
    table = Table(
        {"": -22, " ": 10, "method": 22, "every": 7, "ratio": 9, "middle half": 16, "ms/step": 10}
        | {"+MiB": 9, "+θ": 9}
    )
    results: list[tuple[Point, float, float | None]] = []
    for point, memory in zip(chosen, added, strict=True):
        cells = (point.sweep, str(point.x), point.case.method, str(point.case.every))
        try:
            timing = bench(point).time(point.case, point.block)
        except Exception as error:
            table.print_row(*cells, f"  failed: {describe(error)}")
            continue
        in_theta = None if isinstance(memory, str) else memory / size(point)
        table.print_row(
            *cells,
            f"{timing.ratio:.2f}",
            timing.spread,
            f"{timing.milliseconds:.2f}",
            *([f"  {memory}"] if isinstance(memory, str) else [f"{memory:.1f}", f"{in_theta:.1f}"]),
        )
        results.append((point, timing.ratio, in_theta))
    return results


def plot(results: list[tuple[Point, float, float | None]], options: Any) -> None:
    """Draws time in the upper row and memory in the lower."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    sweeps = list(dict.fromkeys(point.sweep for point, _, _ in results))
    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(4.2 * len(sweeps), 6.4), squeeze=False)
    for column, sweep in enumerate(sweeps):
        rows = [r for r in results if r[0].sweep == sweep]
        for line in dict.fromkeys(point.line for point, _, _ in rows):
            own = [r for r in rows if r[0].line == line]
            xs = [point.x for point, _, _ in own]
            axes[0][column].plot(xs, [ratio for _, ratio, _ in own], "o-", label=line)
            # Below a hundredth of θ is what cannot be measured.
            memory = [(p.x, max(m, 0.01)) for p, _, m in own if m is not None]
            axes[1][column].plot(*zip(*memory, strict=True), "o-", label=line) if memory else None
        for row, label in enumerate(
            ("time / Trainer without callback", "added memory / size of θ")
        ):
            ax = axes[row][column]
            ax.set_xscale("log")
            ax.set_xlabel(sweep)
            ax.grid(alpha=0.3)
            if column == 0:
                ax.set_ylabel(label)
        for row in (0, 1):
            axes[row][column].set_yscale("log", base=2)
            axes[row][column].yaxis.set_major_locator(LogLocator(base=2, numticks=8))
            axes[row][column].yaxis.set_major_formatter("{x:g}")
        axes[0][column].axhline(1.0, color="black", linewidth=0.8)
        axes[0][column].legend(
            fontsize=8, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False
        )
    figure.tight_layout()
    figure.savefig(options.output, dpi=110)
    print(f"\nwrote {options.output.name}")


def main() -> None:
    flags = {"--large": "also 10⁸ parameters: a quarter of an hour on one core, 6 GiB"}
    options = parse(__doc__, __file__, flags=flags)
    print(environment(options.device, options.threads), end="\n\n")
    plot(measure(options), options)


if __name__ == "__main__":
    main()
