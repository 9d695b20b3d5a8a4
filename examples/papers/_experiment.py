"""What the experiments share: cells that are kept as they are finished, tables, versions.

An experiment is a list of cells. A cell is one training, named by a few columns (method, start,
seed …); its results are further columns. Each finished cell is a line of OUTPUT/NAME.csv, and is
not run again: a script can be stopped (Ctrl-C) and goes on where it was. A line that is deleted is
run anew. Tables and pictures are made of that file, also while cells are missing.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

Row = dict[str, str]
"""A line of a file: texts, by column."""


@dataclass
class Experiment:
    """An experiment, and the results that it has so far.

    Args:
        name: Of its files.
        keys: The columns that name a cell.
        train: Runs a cell, and returns its results by column. A function of a module, since it runs
            in other processes. It gets the cell and the options.
        options: What all cells have in common.
        output: The folder of its files.
    """

    name: str
    keys: Sequence[str]
    train: Callable[[dict[str, Any], argparse.Namespace], Mapping[str, Any]]
    options: argparse.Namespace
    output: Path
    rows: dict[tuple[str, ...], Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with self.path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self.rows[self._key(row)] = row

    @property
    def path(self) -> Path:
        """The file of results."""
        return self.output / f"{self.name}.csv"

    def _key(self, cell: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(cell[name]) for name in self.keys)

    def run(self, cells: Iterable[dict[str, Any]]) -> bool:
        """Runs the cells that have no results yet; returns whether it came to the end."""
        missing = [cell for cell in cells if self._key(cell) not in self.rows]
        if not missing:
            return True
        begin = time.monotonic()
        for count, (cell, results) in enumerate(self._results(missing), 1):
            self._keep(cell, results)
            left = (time.monotonic() - begin) / count * (len(missing) - count)
            note(
                f"{count:5}/{len(missing)}  {' '.join(self._key(cell))}  ({left / 60:.0f} min left)"
            )
        return all(self._key(cell) in self.rows for cell in missing)

    def _results(
        self, cells: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Trains, here or in other processes; yields each cell with its results as they come."""
        if self.options.workers == 1:
            quiet()
            for cell in cells:
                yield cell, _train(self.train, cell, self.options)
            return
        pool = ProcessPoolExecutor(self.options.workers, get_context("spawn"), _start_worker)
        jobs = {pool.submit(_train, self.train, cell, self.options): cell for cell in cells}
        errors: list[BaseException] = []
        try:
            for job in as_completed(list(jobs)):
                cell, error = jobs.pop(job), job.exception()
                if error is None:
                    yield cell, job.result()
                else:
                    note(f"{' '.join(self._key(cell))} failed: {error!r}")
                    errors.append(error)
        except KeyboardInterrupt:
            note("stopping; trainings under way are finished first")
            pool.shutdown(cancel_futures=True)
            rest = [j for j in jobs if j.done() and not j.cancelled() and j.exception() is None]
            yield from ((jobs[j], j.result()) for j in rest)
        pool.shutdown()
        if errors:  # after all others are kept
            raise errors[0]

    def _keep(self, cell: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        row = {name: _text(value) for name, value in {**cell, **results}.items()}
        self.rows[self._key(cell)] = row
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def where(self, **cell: Any) -> list[Row]:
        """Returns the results of all cells in which these columns are such."""
        wanted = {name: str(value) for name, value in cell.items()}
        return [row for row in self.rows.values() if wanted.items() <= row.items()]

    def numbers(self, column: str, **cell: Any) -> list[float]:
        """Returns a column of these cells."""
        return [float(row[column]) for row in self.where(**cell)]

    def report(self, title: str, tables: Sequence[str]) -> None:
        """Writes and prints what was found, with the command, the scale and the versions."""
        text = "\n\n".join([f"# {title}", f"`{command()}`\n\n{environment()}", *tables])
        (self.output / f"{self.name}.md").write_text(text + "\n")
        print(text)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    quiet()


def quiet() -> None:
    """Silences what Lightning says of each training; one thread, since cells share the cores."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)


def _train(
    train: Callable[..., Mapping[str, Any]], cell: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    begin = time.process_time()
    results = dict(train(cell, options))
    return results | {"seconds": time.process_time() - begin}


# --------------------------------------------------------------------------------------------------
# Options and text
# --------------------------------------------------------------------------------------------------


def parser(doc: str | None, *, seeds: int, needs_data: bool = True) -> argparse.ArgumentParser:
    """Makes the options that all experiments have.

    Args:
        doc: The docstring of the script.
        seeds: How many by default.
        needs_data: Whether it reads a data set; else ``--data-dir`` is taken and not looked at.
    """
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = "where the data sets are" if needs_data else "not needed here"
    result.add_argument("--data-dir", type=Path, required=needs_data, help=where)
    result.add_argument("--scale", choices=["tiny", "small", "paper"], default="small")
    result.add_argument("--seeds", type=int, default=seeds, help="trainings of each kind")
    result.add_argument("--workers", type=int, default=2, help="processes")
    result.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    return result


def trainer(steps: int, callbacks: Sequence[Callback] = (), **options: Any) -> lightning.Trainer:
    """Makes a Trainer that trains, and says nothing."""
    return lightning.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table in Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    texts = ([str(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in texts)


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Returns a mean and its standard error; a dash where there is no value."""
    if not values:
        return "–"
    if len(values) == 1:
        return format(values[0], form)
    return f"{mean(values):{form}} ± {stdev(values) / len(values) ** 0.5:{form}}"


def command() -> str:
    """Returns what was called, without the folders of this machine."""
    words = [Path(word).name if "/" in word else word for word in sys.argv]
    return " ".join(["python", *words])


def environment() -> str:
    """Returns the class of the machine, and the versions."""
    return (
        f"{os.cpu_count()} cores of a server ({platform.machine()}), one for each training; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {lightning.__version__}"
    )


def note(text: str) -> None:
    """Prints a line to the error stream, for what is not a result."""
    print(text, file=sys.stderr, flush=True)
