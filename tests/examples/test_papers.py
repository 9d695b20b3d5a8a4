"""The papers' experiments at a tiny scale: their tables have the right shape, and known values."""

import csv
import io
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
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
    torch.set_default_dtype(torch.float32)  # as it is in a process of its own
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


@pytest.mark.slow
def test_quadratic(run, monkeypatch):
    import quadratic

    # Long trainings: these methods, and one of the two problems by the default.
    few = {name: quadratic.METHODS[name] for name in ("Unroll1", "Clip2", "Clip5")}
    monkeypatch.setattr(quadratic, "METHODS", few)
    monkeypatch.setattr(quadratic, "ALONE", 1)
    table, cells, files = run("quadratic", "--seeds", "2", needs_data=False)
    rows = {row[0]: row for row in table}
    assert rows["Clip5"][1:5] == ["0.000"] * 4  # the paper's
    # A ball that holds the derivative leaves no bias: λ is at λ† to the digits that are shown.
    assert rows["Clip5"][6] == "0.000"
    assert float(rows["Unroll1"][6]) > float(rows["Clip2"][6]) > 0.01
    assert rows["OnlineHPOCallback()"][1:5] == ["–"] * 4
    assert rows["OnlineHPOCallback()"][-1] == "1"
    assert len(cells) == 4
    assert files == {"quadratic_tiny.csv", "quadratic_tiny.md", "quadratic_tiny.png"}


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


@pytest.mark.slow
def test_hyper_cleaning(run):
    table, cells, files = run("hyper_cleaning")
    rows = {row[0]: row for row in table}
    assert rows["DH-1500"][1:3] == ["90.06", "0.9244"]  # the paper's
    assert len(cells) == 8
    found = {cell["method"]: cell for cell in cells}
    assert float(found["Oracle"]["f1"]) == 1
    assert (found["Oracle"]["kept"], found["Oracle"]["kept_wrong"]) == ("150", "0")
    assert (found["Baseline"]["kept"], found["Baseline"]["kept_wrong"]) == ("300", "150")
    assert float(found["DH-1000"]["f1"]) > 0.75  # it would be 2/3 if all were found
    assert float(found["DH-1000"]["accuracy"]) > float(found["Baseline"]["accuracy"])
    assert files == {"hyper_cleaning_tiny.csv", "hyper_cleaning_tiny.md", "hyper_cleaning_tiny.png"}


def test_projection_of_the_hyper_cleaner(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from hyper_cleaning import CappedL1Ball

    project = CappedL1Ball(3.0).project
    inside = torch.tensor([0.5, 1.0, 0.0])
    assert project(inside).equal(inside)
    assert project(torch.tensor([2.0, -1.0, 0.5])).tolist() == [1, 0, 0.5]
    # They are moved by 0.5, cut off at 1, and sum to 3.
    far = project(torch.tensor([1.7, 1.5, 1.0, 0.8, 0.7, -2.0]))
    torch.testing.assert_close(far, torch.tensor([1.0, 1.0, 0.5, 0.3, 0.2, 0.0]))


def test_secondary_task(run):
    table, cells, files = run("secondary_task")
    rows = {row[0]: row for row in table}
    assert rows["RTHO"][1:3] == ["61.97", "164"]  # the paper's
    assert len(cells) == 6
    found = {cell["method"]: cell for cell in cells}
    assert [float(found["Vanilla"][f"last_{name}"]) for name in "ρημ"] == [0, 0.075, 0.5]
    # Nothing was known: learning rate, momentum and ρ have left 0, Adam's 0.005 at each update.
    assert float(found["RTHO-NT"]["last_η"]) > 0.01
    assert files == {"secondary_task_tiny.csv", "secondary_task_tiny.md", "secondary_task_tiny.png"}


@pytest.mark.slow
def test_fioravanti(run):
    table, cells, files = run("fioravanti", "--seeds", "1")
    rows = {tuple(row[:2]): row for row in table}
    assert rows["all", "T1–T2, report"][5:9] == ["~3 %", "–", "20%", "58%"]
    assert rows["all", "report"][2:4] == ["15.14 s", "16.99 s, +12.22 %"]
    assert rows["deep", "OnlineHPOCallback()"][2] == "1"
    assert len(cells) == 9
    for row in cells:
        path = json.loads(row["path"])
        (noise, log_l2), end = path[0], path[-1]
        assert 0 <= noise <= 0.8
        assert -5.5 <= log_l2 <= -2.5
        assert ([noise, log_l2] == end) == (row["method"] == "fixed")
        assert (row["rerun error"] == "") == (row["method"] == "fixed")
    pictures = {f"fioravanti_tiny_{what}.png" for what in ("trajectories", "errors")}
    assert pictures < files


@pytest.mark.slow
def test_many(run):
    table, cells, files = run("many", "--seeds", "1")
    assert [row[1] for row in table if row[0] == "T1T2()"] == [str(20 * 794), "200"]
    # Every search of one draw costs one training, and two draws are all: the better of the two.
    names = [row[0] for row in table]
    assert "random search, each: best of 2" in names
    searched = [row for row in cells if row["method"] == "random search, one for all"]
    best = min(float(row["held-out"]) for row in searched if row["part"] == "an L2 per weight")
    line = table[names.index("random search, one for all: best of 2")]
    assert line[1:4] == ["1", "2.0", f"{best:.3f}"]
    # The weights of the right labels alone are 1, where these are known.
    oracle = next(row for row in cells if "oracle" in row["method"])
    assert (float(oracle["low"]), float(oracle["high"])) == (0, 1)
    assert files == {"many_tiny.csv", "many_tiny.md", "many_tiny.png"}


@pytest.mark.slow
def test_penn_treebank(run, data_dir):
    table, cells, files = run("penn_treebank")
    rows = {row[0].partition(":")[0]: row for row in table}
    assert rows["Clip10"][1:4] == ["83.1", "83.7", "+0.7 %"]  # the paper's
    assert rows["OnlineHPOCallback()"][1:4] == ["–"] * 3
    assert rows["Clip5, LR scale in {1.0, 0.1}"][-1] == "2"
    # The best of the grid is that of the held-out words, and its neighbours stand beside it.
    fixed = {float(c["start"]): c for c in cells if c["method"] == "Fixed"}
    best = min(fixed, key=lambda keep: float(fixed[keep]["held out"]))
    assert f"Fixed λ, the best: {best}" in {row[0] for row in table}
    assert rows["Fixed λ, the best"][8] == f"{best:.2f}"
    # A fixed keep probability stays, a tuned one moves; all perplexities are below guessing.
    assert all(float(cell["keep"]) == pytest.approx(keep, abs=1e-6) for keep, cell in fixed.items())
    assert all(float(c["keep"]) != 0.5 for c in cells if c["method"] in ("Unroll5", "Clip5"))
    assert all(1 < float(c["best"]) <= float(c["last"]) < 15 for c in cells)
    assert files == {f"penn_treebank_tiny.{kind}" for kind in ("csv", "md", "png")}


def test_penn_treebank_knows_the_most_frequent_words(monkeypatch, data_dir):
    monkeypatch.syspath_prepend(str(FOLDER))
    from _data import penn_treebank

    text = (data_dir / "ptb" / "ptb.test.txt").read_text().replace("\n", " <eos> ").split()
    train, _, kinds = penn_treebank(data_dir, "test", 5)
    known = {word for word, _ in Counter(text).most_common(5)} | {"<unk>"}
    names = [word if word in known else "<unk>" for word in text]
    numbers = dict(zip(names, train.tolist(), strict=True))
    assert [numbers[name] for name in names] == train.tolist()
    assert sorted(numbers.values()) == list(range(kinds))


@pytest.mark.slow
def test_compare(run, data_dir):
    torch.set_default_dtype(torch.float32)  # as it is when it is run by hand
    table, cells, files = run("compare", "--seeds", "1")
    assert files == {"compare_tiny.csv", "compare_tiny.md", "compare_tiny.png"}
    tasks = ["mnist", "digits", "cifar", "diabetes", "ptb"]
    methods = {row["method"] for row in cells}
    assert {
        "ours, sensible start",
        "ours, bad start",
        "random search",
        "population-based",
    } <= methods
    summary = table[2:12]
    assert [row[:2] for row in summary] == [[t, s] for t in tasks for s in ("sensible", "bad")]

    # Four dropout rates by T1T2 after every step: a gradient of its own, one of the held-out loss,
    # and two for each rate.
    found = {(row["task"], row["method"]): row for row in cells}
    assert found["cifar", "ours, bad start"]["gradients"] == "10"

    # Searches show the best so far, and what they found comes out again.
    from _compare_tasks import TASKS, fix, make, start_of
    from compare import at, best_at, needed

    row = found["digits", "random search"]
    curve = json.loads(row["curve"])
    assert [line[0] for line in curve] == [1, 2, 3]
    losses = [line[2] for line in curve]
    assert at([row], 2) == [min(losses[:2])]
    assert best_at(row, 0.5) is None
    assert float(needed([row], min(losses))) == losses.index(min(losses)) + 1
    assert needed([row], 0.0) == "> 3"
    draws = random.Random(0)
    values = {name: axis.draw(draws) for name, axis in TASKS["digits"].axes.items()}
    problem = make(TASKS["digits"], start_of(TASKS["digits"], "bad"), 0, "tiny", data_dir)
    fix(problem.module, values)
    problem.fit()
    assert problem.losses() == pytest.approx(curve[0][2:4], rel=1e-4)
    assert curve[0][4] == pytest.approx(values, rel=1e-2)


def test_compare_peers(run, data_dir):
    """What is written here itself: who goes on with a training, and what stops one."""
    torch.set_default_dtype(torch.float32)
    from _compare_peers import Member, Pruning
    from _compare_tasks import TASKS, make, start_of

    task = TASKS["diabetes"]
    good, bad = (
        Member(make(task, start_of(task, which), 0, "tiny", data_dir), start_of(task, which))
        for which in ("sensible", "bad")
    )
    half = good.problem.steps // 2
    good.problem.fit(steps=half)
    for axes in (task.axes, {}):
        bad.become(good, axes, random.Random(1))
    weights = torch.nn.utils.parameters_to_vector
    assert weights(bad.problem.module.parameters()).equal(weights(good.problem.module.parameters()))
    # The schedule goes on where it was: half of a cosine is left.
    assert good.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3, rel=1e-3)
    good.problem.fit(steps=good.problem.steps - half)
    assert good.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)

    class Trial:
        def __init__(self):
            self.reports = []

        def report(self, loss, piece):
            self.reports.append(piece)

        def should_prune(self):
            return len(self.reports) == 3

    problem = make(task, start_of(task, "bad"), 0, "tiny", data_dir)
    trial = Trial()
    pruning = Pruning(trial, problem)
    problem.fit([pruning])
    assert trial.reports == [1, 2, 3]
    assert pruning.part == pytest.approx(1 / 3, abs=1 / problem.steps)


@pytest.mark.slow
def test_t1t2(run):
    table, cells, files = run("t1t2", "--seeds", "2")
    # Each way of tuning with three setups and two data sets, after the headers and the paper.
    names = [row[0] for row in table[3:]]
    assert [name.split(":")[0] for name in names] == ["T1T2()"] * 5 + ["OnlineHPOCallback()"] * 5
    assert len({len(row) for row in table}) == 1
    assert [row[1] for row in table[3:]] == ["2", "2", "2", "4", "2"] * 2
    # Per setup and start four trainings, and two grids of four.
    assert len(cells) == 3 * 2 * 4 + 2 * 4
    grid = {row["start"]: row for row in cells if row["setup"] == "0" and "grid" in row["start"]}
    assert json.loads(grid["grid 1 0"]["found"]) == {"n0": 1.0, "l2": 1e-6}
    tuned = next(row for row in cells if row["method"] == "T1T2()" and row["setup"] == "0")
    assert [point[0] for point in json.loads(tuned["way"])] == [5, 10, 15, 20]
    # The table is made of the cells; errors are those of whole images.
    change = max(
        float(row["rerun error"]) - float(other["error"])
        for row in cells
        for other in cells
        if (row["method"], other["method"]) == ("T1T2()", "fixed")
        and row["setup"] == other["setup"] == "2"
        and (row["start"], row["seed"]) == (other["start"], other["seed"])
    )
    assert float(table[5][6]) == pytest.approx(change, abs=0.01)
    assert float(tuned["error"]) * 2.97 == pytest.approx(
        round(float(tuned["error"]) * 2.97), abs=0.01
    )
    assert {f"t1t2_tiny_{what}.png" for what in ("maps", "evolution", "scatter")} < files


def test_t1t2_rank_correlation(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from t1t2 import rank_correlation

    xs, ys = [3.0, 1.0, 2.0, 2.0, 7.0], [1.0, 1.0, 4.0, 3.0, 5.0]
    assert rank_correlation(xs, ys) == pytest.approx(spearmanr(xs, ys).statistic)


def test_derivative(run, tmp_path):
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

    # Finished cells are kept ("seconds" would differ if they had been run again), others are run.
    path = tmp_path / "derivative_tiny.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    _, again, _ = run("derivative", needs_data=False)
    assert again[:-1] == cells[:-1]
    last = [{n: v for n, v in found[-1].items() if n != "seconds"} for found in (again, cells)]
    assert last[0] == last[1]


@pytest.mark.slow
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


def test_mnist_l2_beside_optuna(run, monkeypatch):
    pytest.importorskip("optuna", reason="it is in the extra compare")
    import mnist_l2

    monkeypatch.setattr(mnist_l2, "SEARCHES", range(1))
    monkeypatch.setattr(mnist_l2, "TRAININGS", (2, 4))
    table, cells, files = run("mnist_l2", "--tpe")
    rows = {row[0]: row for row in table[:15]}
    two, four = (float(rows[f"Optuna's TPE, best of {count}"][5]) for count in (2, 4))
    assert four <= two
    assert rows["Fixed λ, as it starts"][-1] == rows["OnlineHPOCallback()"][-1] == "2"
    assert len(cells) == 5
    bests = json.loads(cells[-1]["curve"])
    assert bests == sorted(bests, key=lambda best: -best["last"])
    assert all(1e-6 <= best["l2"] <= 1e-1 for best in bests)
    assert files == {"mnist_l2_tiny.csv", "mnist_l2_tiny.md"}
