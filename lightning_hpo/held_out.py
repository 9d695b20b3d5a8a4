"""Held-out batches of a training: whose they are, and how they come to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils._pytree import TreeSpec, tree_flatten
from torch.utils.data import DataLoader

from lightning_hpo._lightning import MisconfigurationException, classes
from lightning_hpo._trainer import overrides, stage
from lightning_hpo.data import CombinedStream, T2Stream
from lightning_hpo.private_state import PrivateState
from lightning_hpo.rng import forked_rng, seeded_rng
from lightning_hpo.shield import Shield

_TRANSFER_HOOKS = (
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)


@dataclass
class HeldOutBatch:
    """A held-out batch on the device.

    Attributes:
        batch: The batch.
        batch_idx: Its index, as the validation loop counts.
        dataloader_idx: Which of several validation dataloaders it stands for; None where
            ``validation_step`` is called without.
    """

    batch: Any
    batch_idx: int = 0
    dataloader_idx: int | None = None


@dataclass
class _Source:
    """Loaders of held-out data, and the structure of a batch, if it is made of one from each."""

    loaders: list[Any]
    spec: TreeSpec | None = None
    is_one_of_several: bool = False

    def is_same(self, other: _Source) -> bool:
        return len(self.loaders) == len(other.loaders) and all(
            a is b for a, b in zip(self.loaders, other.loaders, strict=True)
        )


class HeldOut:
    """The held-out data: an argument, else ``hpo_dataloader()``, else the validation dataloaders.

    Where these are reloaded (``reload_dataloaders_every_n_epochs``), or others take their place,
    the stream goes over to the new ones. Several dataloaders (a list, a dict, a sequential
    CombinedLoader) are treated as those of the validation: ``dataloader_idx`` says from which one
    batches are drawn. A CombinedLoader of another mode makes batches of batches.

    Args:
        trainer: The trainer.
        module: The LightningModule.
        dataloader: The callback's argument.
        dataloader_idx: Which of several dataloaders.
        seed: Seed of the order.
        moves: Whether batches are moved to the device also for a ``validation_step`` that moves
            them itself (``dataloader_iter``).

    Raises:
        MisconfigurationException: If ``dataloader_idx`` is out of range, or there are no data in
            what was found.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        dataloader: Iterable[Any] | None = None,
        dataloader_idx: int = 0,
        seed: int = 0,
        *,
        moves: bool = False,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._argument = dataloader
        self._index = dataloader_idx
        self._seed = seed
        step = module.validation_step
        self._moves = moves or not is_param_in_hook_signature(
            step, "dataloader_iter", explicit=True
        )
        self._shield = Shield(trainer, module)
        # Of the rest of the module the shield takes care.
        hooks = [getattr(type(module), hook, None) for hook in _TRANSFER_HOOKS]
        self._drawing = PrivateState(*hooks, random_only=True)
        self._datamodule = PrivateState(getattr(trainer, "datamodule", None))
        self._epoch = trainer.current_epoch
        self._requested: Any = None
        self._source = self._find()
        self._stream = None if self._source is None else self._make_stream(self._source)

    @property
    def is_found(self) -> bool:
        """Whether there are any data."""
        return self._source is not None

    @property
    def loaders(self) -> list[Any]:
        """The loaders that batches are drawn from."""
        return [] if self._source is None else self._source.loaders

    @property
    def consumed(self) -> int:
        """How many batches were consumed."""
        return self._open.consumed

    def peek(self) -> HeldOutBatch:
        """Returns the next batch without consuming it."""
        return self._placed(self._open.peek(), self.consumed)

    def next(self) -> HeldOutBatch:
        """Returns the next batch."""
        self._follow()
        k = self.consumed
        return self._placed(self._open.next(), k)

    def skip_to(self, consumed: int) -> None:
        """Continues after ``consumed`` batches, for a resumed training."""
        self._open.skip_to(consumed)

    @property
    def _open(self) -> T2Stream | CombinedStream:
        assert self._stream is not None
        return self._stream

    # ------------------------------------------------------------------------------------- sources

    def _find(self) -> _Source | None:
        if self._argument is not None:
            return self._choose(self._argument)
        if self._requested is None:
            for owner in (self._module, getattr(self._trainer, "datamodule", None)):
                hook = getattr(owner, "hpo_dataloader", None)
                if callable(hook):
                    self._requested = self._request(hook)
                    _check_repeats(self._requested, f"{type(owner).__name__}.hpo_dataloader()")
                    break
        if self._requested is not None:
            return self._choose(self._requested)
        loop = self._trainer.fit_loop.epoch_loop.val_loop
        loaders = loop._combined_loader
        if loaders is None:
            # Not loaded yet (no sanity check, or check_val_every_n_epoch > 1), or never.
            source = getattr(loop, "_data_source", None)
            if source is None or not source.is_defined():
                return None
            self._requested = loaders = self._request(source.dataloader)
        return None if loaders is None else self._choose(loaders, validates=True)

    def _request(self, hook: Any) -> Any:
        self._epoch = self._trainer.current_epoch
        with forked_rng(self._shield.device):
            return hook()

    def _choose(self, given: Any, *, validates: bool = False) -> _Source | None:
        """Reads loaders as Lightning does those of the validation."""
        combined = classes("utilities.CombinedLoader")
        if not (validates or isinstance(given, (dict, *combined)) or _holds_loaders(given)):
            return _Source([given])
        if not isinstance(given, combined):
            loop = self._trainer.fit_loop.epoch_loop.val_loop
            # A validation_step that gets batches of batches gets them here as well.
            given = CombinedLoader(given, getattr(loop._combined_loader, "_mode", "sequential"))
        flat = given.flattened
        if not flat:
            return None
        if given._mode != "sequential":
            return _Source(list(flat), tree_flatten(given.iterables)[1])
        if not 0 <= self._index < len(flat):
            raise MisconfigurationException(
                f"OnlineHPOCallback: dataloader_idx={self._index}, but there are {len(flat)} "
                f"validation dataloaders; expected 0 to {len(flat) - 1}"
            )
        return _Source([flat[self._index]], is_one_of_several=len(flat) > 1)

    def _make_stream(self, source: _Source) -> T2Stream | CombinedStream:
        rank, world_size = self._trainer.global_rank, max(1, self._trainer.world_size)
        streams = [T2Stream(each, self._seed, rank, world_size) for each in source.loaders]
        return streams[0] if source.spec is None else CombinedStream(streams, source.spec)

    def _follow(self) -> None:
        """Goes over to other loaders where Lightning has, or would have, made new ones."""
        if self._argument is not None:
            return
        trainer = self._trainer
        every = getattr(trainer, "reload_dataloaders_every_n_epochs", 0)
        loaded = trainer.fit_loop.epoch_loop.val_loop._combined_loader
        if self._requested is None:
            is_due = loaded is not None
        else:
            is_due = bool(every and trainer.current_epoch - self._epoch >= every)
        if not is_due:
            return
        self._requested = None
        found = self._find()
        if found is None or self._source is None or found.is_same(self._source):
            return
        consumed = self.consumed
        self._source = found
        self._stream = self._make_stream(found)
        self._stream.skip_to(consumed, anew=True)

    # ------------------------------------------------------------------------------------ transfer

    def _placed(self, batch: Any, k: int) -> HeldOutBatch:
        assert self._source is not None
        index = self._index if self._source.is_one_of_several else None
        if self._moves:
            batch = self._to_device(batch, k)
        return HeldOutBatch(batch, self._batch_idx(k), index)

    def _to_device(self, batch: Any, k: int) -> Any:
        """Moves a batch to the device through the user's transfer hooks, as in validation."""
        trainer, module = self._trainer, self._module
        with stage(trainer, RunningStage.VALIDATING), self._hooks_leave_nothing(k):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=self._index)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=self._index)

    @contextmanager
    def _hooks_leave_nothing(self, k: int) -> Iterator[None]:
        datamodule = getattr(self._trainer, "datamodule", None)
        of_module = _has_any(self._module, "LightningModule")
        of_data = datamodule is not None and _has_any(datamodule, "LightningDataModule")
        if not (of_module or of_data):
            yield
            return
        with (
            self._shield() if of_module else nullcontext(),
            seeded_rng(self._shield.device, self._seed, k) as seed,
            self._drawing(seed),
            self._datamodule(seed),
        ):
            yield

    def _batch_idx(self, k: int) -> int:
        """Returns an index that the validation loop could give."""
        limits = list(self._trainer.num_val_batches)
        assert self._source is not None
        if self._source.spec is None and self._source.is_one_of_several:
            limits = limits[self._index : self._index + 1]
        count = min(limits, default=0) or self._open.length or 0
        return k if count in (0, float("inf")) else k % int(count)


def _check_repeats(given: Any, origin: str) -> None:
    """Refuses an iterator, which ends in the middle of a training.

    Raises:
        MisconfigurationException: If it is one.
    """
    if isinstance(given, Iterator) and not isinstance(given, classes("utilities.CombinedLoader")):
        raise MisconfigurationException(
            f"OnlineHPOCallback: {origin} returned a {type(given).__name__}, expected a "
            "DataLoader, or another iterable of batches that can be iterated again and again"
        )


def _has_any(owner: Any, kind: str) -> bool:
    return any(overrides(owner, hook, *classes(kind)) for hook in _TRANSFER_HOOKS)


def _holds_loaders(value: Any) -> bool:
    """Whether a list holds dataloaders, and no batches."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_loaders, value))
    return isinstance(value, (DataLoader, *classes("utilities.CombinedLoader")))
