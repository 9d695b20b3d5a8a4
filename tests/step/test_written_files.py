"""Files that a step writes, by their names: they are named, and not put back."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Mlp, observe

from lightning_hpo import T1T2, ClipR, UnrollK
from lightning_hpo.step.written_files import files_written

ESTIMATORS = {"T1T2": T1T2, "ClipR": ClipR, "reverse": lambda: UnrollK(3, "reverse")}


def write_text(path):
    path.write_text("a line")


def open_to_append(path):
    with open(path, "a") as file:
        file.write("a line")


WRITES = {
    "torch": lambda path: torch.save(torch.zeros(2), path),
    "numpy": lambda path: np.save(str(path), np.zeros(2)),
    "text": write_text,
    "append": open_to_append,
}


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("where", ["training_step", "validation_step"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_files_that_steps_write_are_named_once(write, where, make, tmp_path):
    path = tmp_path / "noise.npy"

    class Writing(Mlp):
        pass

    def step(self, batch, batch_idx):
        write(path)
        return self.loss(batch)

    setattr(Writing, where, step)
    save = torch.save
    with pytest.warns(UserWarning, match=r"write.*noise\.npy.*are not put back") as caught:
        observe(make(), Writing(), steps=3)
    assert sum("noise.npy" in str(w.message) for w in caught) == 1
    assert torch.save is save


class Reading(Mlp):
    """Only reads files."""

    def training_step(self, batch, batch_idx):
        assert Path(__file__).read_text()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("kind", [Mlp, Reading])
def test_others_are_not_bothered(kind, make):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*write, as the training does")
        observe(make(), kind(), steps=3)


def test_nothing_is_noted_when_nobody_looks(tmp_path):
    with files_written() as files:
        write_text(tmp_path / "a")
    write_text(tmp_path / "b")
    with files_written() as more:
        torch.save(torch.zeros(1), tmp_path / "c")
    assert (files, more) == ([str(tmp_path / "a")], [str(tmp_path / "c")])
