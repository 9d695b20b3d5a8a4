"""What the benchmarks share: models, data, the clock, the memory gauge, tables."""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import multiprocessing
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_hpo import DropoutMixin, ExampleWeightMixin, GaussianNoiseMixin, L2Mixin

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

WEIGHT_DECAY = 1e-4
LEARNING_RATE = 0.01
MOMENTUM = 0.9
MIB = 2**20

# --------------------------------------------------------------------------------------------------
# Models and data
# --------------------------------------------------------------------------------------------------

PIXELS = 784
CLASSES = 10


def mlp(width: int = 1000, dropout: float = 0.0) -> nn.Sequential:
    """784-width-width-width-10, with a dropout layer after each hidden layer where asked for."""
    layers: list[nn.Module] = []
    for inputs in (PIXELS, width, width):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def cnn(dropout: float = 0.0) -> nn.Sequential:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 128),
        nn.ReLU(),
        *([nn.Dropout(dropout)] if dropout else []),
        nn.Linear(128, CLASSES),
    )


class LSTM(nn.Module):
    """Reads an image row by row."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.rnn = nn.LSTM(28, 128, batch_first=True)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(x.unflatten(1, (28, 28)))
        return self.head(self.drop(hidden[:, -1]))


class Transformer(nn.Module):
    """Two encoder layers over the rows of an image."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(28, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.encoder(self.embed(x.unflatten(1, (28, 28)))).mean(1)))


@dataclass
class Architecture:
    """A network, its batch size, and the names of the modules before which hidden noise goes."""

    make: Callable[..., nn.Module]
    batch_size: int
    hidden: list[str]


ARCHITECTURES = {
    "mlp": Architecture(mlp, 100, ["net.2", "net.4", "net.6"]),
    "cnn": Architecture(cnn, 100, ["net.4", "net.8", "net.10"]),
    "lstm": Architecture(LSTM, 100, ["net.head"]),
    "transformer": Architecture(Transformer, 100, ["net.encoder", "net.head"]),
}


def make_data(batch_size: int, count: int = 1000) -> list[list[Tensor]]:
    """Returns batches of random images, labels that a linear map gives, and positions."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, PIXELS, generator=generator)
    labels = (images @ torch.randn(PIXELS, CLASSES, generator=generator)).argmax(1)
    index = torch.arange(count)
    parts = (t.split(batch_size) for t in (images, labels, index))
    return [list(batch) for batch in zip(*parts, strict=True)]


def held_out(batch_size: int) -> DataLoader:
    """Returns a loader of held-out batches, one indexing operation each."""
    batches = make_data(batch_size, 5 * batch_size)
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
    sampler = BatchSampler(RandomSampler(data), batch_size, drop_last=True)
    return DataLoader(data, batch_size=None, sampler=sampler)


class LitPlain(lightning.LightningModule):
    """An ordinary classifier, with weight decay inside the optimizer."""

    def __init__(self, net: nn.Module, weight_decay: float = WEIGHT_DECAY) -> None:
        super().__init__()
        self.net = net
        self.weight_decay = weight_decay

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, _ = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, _ = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=self.weight_decay
        )


class LitTuned(L2Mixin, GaussianNoiseMixin, DropoutMixin, ExampleWeightMixin, LitPlain):
    """The same with hyperparameters.

    Args:
        net: The network.
        l2: ``"model"``, ``"layer"`` or ``"parameter"``; ``"loss"`` for one λ inside the loss; empty
            for weight decay inside the optimizer.
        noise_at: Modules to add noise before, besides the input; None for no noise.
        dropout: Whether the dropout layers are made tunable.
        examples: The number of example weights.
    """

    def __init__(
        self,
        net: nn.Module,
        l2: str = "",
        noise_at: Sequence[str] | None = None,
        dropout: bool = False,
        examples: int = 0,
    ) -> None:
        super().__init__(net, 0.0 if l2 else WEIGHT_DECAY)
        self.l2_in_loss = l2 == "loss"
        self.examples = examples
        if l2:
            granularity = "model" if self.l2_in_loss else l2
            self.register_l2(WEIGHT_DECAY, granularity=granularity, inside_loss=self.l2_in_loss)
        if noise_at is not None:
            self.register_noise(0.1)
            self.register_noise(0.1, at=list(noise_at), name="hidden_noise")
        if dropout:
            modules = self.named_modules()
            self.register_dropout(at=[n for n, m in modules if isinstance(m, nn.Dropout) and m.p])
        if examples:
            self.register_example_weights(examples)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        if self.examples:
            losses = F.cross_entropy(self.net(x), y, reduction="none")
            return self.weighted_mean(losses, index % self.examples)
        loss = F.cross_entropy(self.net(x), y)
        return loss + self.penalty() if self.l2_in_loss else loss


def fit(
    module: lightning.LightningModule,
    batches: Stepper | Limited,
    callbacks: Sequence[Callback] = (),
    device: str = "cpu",
    batch_size: int = 100,
) -> None:
    """Trains until there are no more batches; held-out batches are there for the callback."""
    trainer = silent_trainer(accelerator=device, devices=1, max_epochs=1, callbacks=list(callbacks))
    trainer.fit(module, batches, held_out(batch_size))


def silent_trainer(**options: Any) -> lightning.Trainer:
    """Makes a Trainer that trains, and does nothing else."""
    return lightning.Trainer(
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


# --------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------


class Stepper:
    """A training in a thread of its own that moves only while :meth:`advance` waits for it.

    Several trainings can so be interleaved in one process, in blocks of steps, each in the middle
    of its own ``trainer.fit``. The time of a block runs from one request for a batch to another:
    it holds whole steps with all that hangs on them, and no set-up.

    Args:
        train: Trains on the batches that it gets by iterating over its argument.
        data: Batches, repeated without end.
        device: ``"cpu"`` or ``"cuda"``.
        threads: The number of threads of torch.
    """

    def __init__(
        self,
        train: Callable[[Stepper], None],
        data: Sequence[Any],
        device: str = "cpu",
        threads: int = 1,
    ) -> None:
        self._train = train
        self._data = data
        self._device = device
        self._threads = threads
        self._position = 0
        self._left = 0
        self._over = False
        self._error: BaseException | None = None
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._paused.acquire()
        self._check()

    def __len__(self) -> int:
        return 10**9  # a known length: Lightning then does not fetch ahead

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._left == 0 and not self._over:
            self._paused.release()
            self._resume.acquire()
        if self._over:
            raise StopIteration
        self._left -= 1
        self._position += 1
        return self._data[self._position % len(self._data)]

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            self._train(self)
        except BaseException as error:
            self._error = error
        self._over = True
        self._paused.release()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._over:
            raise RuntimeError("the training has ended by itself")

    def advance(self, steps: int) -> float:
        """Trains for so many steps; returns the seconds that they took."""
        self._left = steps
        stop = start_clock(self._device, self._threads)
        self._resume.release()
        self._paused.acquire()
        self._check()
        return stop()

    def close(self) -> None:
        """Ends the training."""
        if not self._over:
            self._over = True
            self._resume.release()
            self._thread.join()
        gc.collect()


def start_clock(device: str, threads: int) -> Callable[[], float]:
    """Starts a clock; the result stops it and returns seconds.

    On one thread that is the processor time of this process, which other processes disturb least;
    on several threads it is wall time, on a GPU the time between two CUDA events.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()

        def stop() -> float:
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000

        return stop
    now = time.process_time if threads == 1 else time.perf_counter
    begin = now()
    return lambda: now() - begin


@dataclass
class Timing:
    """Seconds per step of two interleaved trainings, one pair of numbers per round."""

    baseline: list[float]
    method: list[float]

    @property
    def ratios(self) -> list[float]:
        """Method over baseline, sorted."""
        return sorted(m / b for b, m in zip(self.baseline, self.method, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the pairs."""
        return median(self.ratios)

    @property
    def milliseconds(self) -> float:
        """The median time of a step of the method."""
        return 1000 * median(self.method)

    @property
    def spread(self) -> str:
        """The middle half of the pairs."""
        ratios = self.ratios
        quarter = len(ratios) // 4
        return f"{ratios[quarter]:.2f}–{ratios[-1 - quarter]:.2f}"


def compare(
    start: Callable[[], tuple[Stepper, Stepper]], block: int, rounds: int, warmup: int, starts: int
) -> Timing:
    """Advances two trainings in turn, a block of steps each; who goes first alternates.

    Where the allocator puts the tensors of a training changes its speed by several per cent for as
    long as it lasts. So both are started afresh a few times.

    Args:
        start: Starts the baseline and the method.
        block: Steps in a block; a multiple of the distance of two updates.
        rounds: Pairs of blocks per start.
        warmup: Steps before the first block.
        starts: How often both are started.
    """
    timing = Timing([], [])
    for _ in range(starts):
        steppers = start()
        try:
            for stepper in steppers:
                stepper.advance(warmup)
            gc.collect()
            for i in range(rounds):
                pair = [*zip(steppers, (timing.baseline, timing.method), strict=True)]
                for stepper, seconds in pair if i % 2 == 0 else pair[::-1]:
                    seconds.append(stepper.advance(block) / block)
        finally:
            for stepper in steppers:
                stepper.close()
    return timing


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


class Limited:
    """So many batches, and a note of the peak memory at the end of each of several spans of steps.

    Args:
        data: Batches, repeated.
        spans: The steps at which a span ends; the peak is reset there.
        peak: Reads the peak memory since the last reset, in bytes, and resets it.
    """

    def __init__(self, data: Sequence[Any], spans: Sequence[int], peak: Callable[[], int]) -> None:
        self._data = data
        self._spans = spans
        self._peak = peak
        self._step = 0
        self.peaks: list[int] = []

    def __len__(self) -> int:
        return self._spans[-1] + 1

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._step in self._spans[len(self.peaks) :]:
            gc.collect()
            self.peaks.append(self._peak())
        if self._step == self._spans[-1]:
            raise StopIteration
        self._step += 1
        return self._data[self._step % len(self._data)]


Prepare = Callable[[bool], Callable[[Limited], None]]
WARMUP_STEPS = 21


def memory_problem(device: str) -> str:
    """Says why peak memory cannot be measured; empty if it can."""
    if device == "cuda":
        return ""
    if not Path("/proc/self/clear_refs").exists():
        return "peak memory on a CPU is read from /proc/self, which this system does not have"
    return ""


def peak_memory(
    prepare: Prepare,
    data: Sequence[Any],
    spans: Sequence[int],
    device: str = "cpu",
    threads: int = 1,
) -> list[float] | str:
    """Returns the peak memory of each span of a training, in MiB above what there was before it.

    On a CPU the peak is that of the resident set of a child process whose allocator gives every
    block of more than 8 KiB back at once, so that it is the sum of the live tensors to within
    about a MiB. "Before" is with data, parameters and libraries in place. Call it before anything
    is computed in this process: the child is a fork.

    Args:
        prepare: Makes everything but the training, and returns the training. It is called with True
            for a small training that comes first, so that libraries are loaded; then with False.
        data: Batches.
        spans: The steps at which the spans end.
        device: ``"cpu"`` or ``"cuda"``.
        threads: The number of threads of torch.

    Returns:
        The peaks, or what went wrong.
    """
    if device == "cuda":
        return _cuda_peaks(prepare, data, spans)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside (idle) threads
        child = context.Process(target=_cpu_peaks, args=(sender, prepare, data, spans, threads))
        child.start()
    sender.close()
    try:
        answer: list[float] | str = receiver.recv()
    except EOFError:
        answer = "the process that measured the memory died"
    child.join()
    return answer


def _cpu_peaks(
    sender: Any,
    prepare: Prepare,
    data: Sequence[Any],
    spans: Sequence[int],
    threads: int,
) -> None:
    try:
        torch.set_num_threads(threads)
        # A fixed threshold (M_MMAP_THRESHOLD, glibc): freed tensors leave the resident set.
        ctypes.CDLL(None).mallopt(-3, 8192)
        # What is in memory stays there (mlockall, each page from when it is first used): a kernel
        # that reclaims cold pages would lower the resident set. Where it is not allowed, it may.
        if ctypes.CDLL(None).mlockall(1 | 2 | 4):
            print("memory: pages cannot be locked; what is reclaimed is missing", file=sys.stderr)
        prepare(True)(Limited(data, (WARMUP_STEPS,), lambda: 0))
        train = prepare(False)
        gc.collect()
        before = _resident("VmRSS")
        _reset_peak()

        def peak() -> int:
            value = _resident("VmHWM")
            _reset_peak()
            return value

        limited = Limited(data, spans, peak)
        train(limited)
        sender.send([(p - before) / MIB for p in limited.peaks])
    except BaseException as error:
        sender.send(describe(error))
    finally:
        sender.close()


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def _cuda_peaks(
    prepare: Prepare,
    data: Sequence[Any],
    spans: Sequence[int],
) -> list[float] | str:
    def peak() -> int:
        value = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return value

    try:
        prepare(True)(Limited(data, (WARMUP_STEPS,), lambda: 0))
        train = prepare(False)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        limited = Limited(data, spans, peak)
        train(limited)
        return [(p - before) / MIB for p in limited.peaks]
    except Exception as error:
        return describe(error)


def activations(net: nn.Module, x: Tensor) -> float:
    """Returns the MiB that one pass keeps for its backward, parameters and inputs left out."""
    own = {p.data_ptr() for p in net.parameters()} | {x.data_ptr()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = net(x).sum()
    del output
    return sum(kept.values()) / MIB


def describe(error: BaseException) -> str:
    """Returns an error in one line."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


def environment(device: str, threads: int) -> str:
    """Describes the class of the machine, and the versions."""
    name = platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            name = f"{name}, {names[0]}, {torch.backends.cpu.get_cpu_capability()}"
    return (
        f"{name}, {threads} thread{'s' if threads > 1 else ''}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {lightning.__version__}"
    )


def parse(
    doc: str | None,
    script: str,
    models: Sequence[str] = (),
    flags: dict[str, str] | None = None,
) -> argparse.Namespace:
    """Reads the arguments that the benchmarks share, and switches of their own.

    Args:
        doc: The description.
        script: The path of the script, beside which the picture goes.
        models: What ``--model`` may be; empty for no such argument.
        flags: Further switches and their meaning.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if models:
        parser.add_argument("--model", choices=models, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="a few minutes, rougher numbers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, default=Path(script).with_suffix(".png"), help="the picture"
    )
    for flag, meaning in (flags or {}).items():
        parser.add_argument(flag, action="store_true", help=meaning)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    torch.set_num_threads(options.threads)
    return options


class Table:
    """Prints rows as they come, in columns of fixed width.

    Args:
        columns: The heading and the width of each column; a negative width aligns to the left.
    """

    def __init__(self, columns: dict[str, int]) -> None:
        self._widths = list(columns.values())
        self.print_row(*columns)

    def print_row(self, *cells: str) -> None:
        """Prints one row; missing cells stay empty."""
        texts = (
            f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
            for cell, width in zip(cells, self._widths, strict=False)
        )
        print("".join(texts).rstrip(), flush=True)


def note(text: str) -> None:
    """Prints a line to the error stream, for what is not a result."""
    print(text, file=sys.stderr, flush=True)
