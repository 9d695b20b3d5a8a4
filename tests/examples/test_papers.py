"""The papers' experiments at a tiny scale: their tables have the right shape, and known values."""

import csv
import io
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F

FOLDER = Path(__file__).parents[2] / "examples" / "papers"


def write_idx(path, values):
    """Writes bytes as the files of MNIST have them."""
    header = bytes([0, 0, 8, values.dim()]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Small files in the form of the real ones: scikit-learn's digits, enlarged, and words."""

    folder = tmp_path_factory.mktemp("data")
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * 15.9
    labels = torch.tensor(digits.target)
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    large = F.pad(F.interpolate(images, scale_factor=3), (2, 2, 2, 2))[:, 0]
    for name, part in (("train", slice(1500)), ("t10k", slice(1500, None))):
        write_idx(raw / f"{name}-images-idx3-ubyte", large[part])
        write_idx(raw / f"{name}-labels-idx1-ubyte", labels[part])

    (folder / "cifar10").mkdir()
    colored = F.interpolate(images, scale_factor=4).expand(-1, 3, -1, -1).to(torch.uint8)
    arrays = {}
    for name, part in (("train", slice(600)), ("test", slice(600, 800))):
        coded = [jpeg(image) for image in colored[part]]
        arrays[f"{name}_jpeg"] = numpy.frombuffer(b"".join(coded), numpy.uint8)
        arrays[f"{name}_offsets"] = numpy.cumsum([0, *(len(code) for code in coded)])
        arrays[f"{name}_labels"] = labels[part].numpy()
    numpy.savez(folder / "cifar10" / "cifar10_jpeg.npz", **arrays)

    (folder / "ptb").mkdir()
    draw = torch.Generator().manual_seed(0)
    for part in ("test", "valid"):
        lines = torch.randint(20, (200, 10), generator=draw).tolist()
        text = "\n".join(" ".join(f"word{i}" if i else "<unk>" for i in line) for line in lines)
        (folder / "ptb" / f"ptb.{part}.txt").write_text(text + "\n")
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, data_dir):
    """Runs a script in this process; returns the rows of its tables, its CSV, and its files."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    threads = torch.get_num_threads()

    def run(name, *arguments, needs_data=True, output=tmp_path):
        options = ["--data-dir", str(data_dir)] if needs_data else []
        words = [f"{name}.py", "--scale", "tiny", "--workers", "1", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [*words, *options, *arguments])
        __import__(name).main()
        out = capsys.readouterr().out
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in out.splitlines() if line[:1] == "|"]
        table = [[cell.strip() for cell in row] for row in rows]
        files = {path.name for path in output.iterdir()}
        with (output / f"{name}_tiny.csv").open(newline="") as file:
            return table, list(csv.DictReader(file)), files

    yield run
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_quadratic(run, tmp_path):
    table, cells, files = run("quadratic", "--seeds", "2", needs_data=False)
    rows = {row[0]: row for row in table}
    assert rows["Clip5"][1:5] == ["0.000"] * 4  # the paper's
    # A ball that holds the derivative leaves no bias: λ is at λ† to the digits that are shown.
    assert rows["Clip5"][6] == "0.000"
    assert float(rows["Unroll1"][6]) > float(rows["Clip2"][6]) > 0.01
    assert rows["OnlineHPOCallback()"][1:5] == ["–"] * 4
    assert rows["OnlineHPOCallback()"][-1] == "2"
    assert len(cells) == 7
    assert files == {"quadratic_tiny.csv", "quadratic_tiny.md", "quadratic_tiny.png"}

    # Finished cells are kept ("seconds" would differ if they had been run again), others are run.
    path = tmp_path / "quadratic_tiny.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    _, again, _ = run("quadratic", "--seeds", "2", needs_data=False)
    assert again[:-1] == cells[:-1]
    assert again[-1]["trace"] == cells[-1]["trace"]


def test_data(monkeypatch, data_dir):
    monkeypatch.syspath_prepend(str(FOLDER))
    from _data import batches, cifar, mnist, penn_treebank

    images, labels = mnist(data_dir, "test")
    assert images.shape == (297, 784)
    assert labels[:3].tolist() == load_digits().target[1500:1503].tolist()
    assert 0.9 < images.max() <= 1
    assert cifar(data_dir, "train")[0].shape == (600, 3, 32, 32)
    train, other, kinds = penn_treebank(data_dir)
    assert train.shape == other.shape == (2200,)
    assert kinds == 21
    loader = batches(torch.utils.data.TensorDataset(labels), 100)
    assert torch.cat([batch for (batch,) in loader]).equal(labels)


def test_derivative(run):
    table, cells, files = run("derivative", needs_data=False)
    rows = {tuple(row[:2]): row[2:] for row in table}
    # y after one step is −η B = 0.1 · θ*(λ₀), with θ*(λ₀) = 1 / 1.3.
    assert rows["0.1", "exact y"][0] == rows["0.1", "UnrollK(1)"][-3] == "0.07692"
    for eta in ("0.1", "0.02"):
        exact, kept = rows[eta, "exact y"], rows[eta, "ClipR(inf)"]
        assert kept[:4] == exact[:4]
        assert kept[-1] == exact[-1] == "0.76923"  # θ has not moved
        assert rows[eta, "UnrollK(5)"][3] == exact[1]
    assert rows["0.1", "exact y"][-2] == "0.59172"  # |dθ*/dλ| = 1 / 1.3²
    assert len(cells) == 12
    assert files == {"derivative_tiny.csv", "derivative_tiny.md", "derivative_tiny.png"}


def test_mnist_l2(run):
    torch.set_default_dtype(torch.float32)  # as it is in a process of the script
    table, cells, files = run("mnist_l2")
    rows = {row[0]: row for row in table[:13]}
    assert rows["Clip20"][1:4] == ["70.8", "71.8", "+1.4%"]  # the paper's
    assert rows["OnlineHPOCallback()"][1:4] == ["–"] * 3
    assert rows["Clip20"][-1] == rows["Fixed λ, as it starts"][-1] == "2"
    assert rows["Fixed λ, as it starts"][-2] == "1.0e-06 … 1.0e-01"
    assert rows["Fixed λ, best of the grid"][-1] == "1"
    assert all(float(cell["best"]) <= float(cell["last"]) for cell in cells)
    assert all(
        float(cell["l2"]) != float(cell["start"]) for cell in cells if "Clip" in cell["method"]
    )
    assert len(cells) == 20
    assert files == {"mnist_l2_tiny.csv", "mnist_l2_tiny.md", "mnist_l2_tiny.png"}
