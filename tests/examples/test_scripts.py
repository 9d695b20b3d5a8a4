"""The short examples run as they stand, at a tiny scale, and end with what was gained and spent."""

import json
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"
EPOCHS = {
    "adamw_decay": 8,
    "augmentation": 8,
    "dropout": 8,
    "hyper_cleaning": 12,
    "learning_rate": 2,
    "multitask": 6,
    "noise": 8,
    "quickstart": 40,
    "transformer": 8,
}
MORE = {"transformer": ["--characters", "2000"]}
# A closing sentence has a metric before and after, and what it took.
CLOSING = r"takes? the test loss from ([\d.]+) to ([\d.]+), in (?:one training|two trainings) of "
CLOSING += r"([\d.]+) times the time of a plain one.* Picture: (\w+\.png)"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script in a folder of its own; returns the figures that it says at its end."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        closing = capsys.readouterr().out.strip().splitlines()[-1]
        before, after, times, picture = re.search(CLOSING, closing).groups()
        assert [path.name for path in tmp_path.iterdir()] == [picture]
        assert (tmp_path / picture).stat().st_size > 5000
        return float(before), float(after), float(times)

    yield run
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("name", EPOCHS)
def test_a_script_trains_twice_and_says_what_was_gained(run, name):
    before, after, times = run(name, "--epochs", str(EPOCHS[name]), *MORE.get(name, []))
    assert before != after  # λ has moved the training
    assert times > 0


def test_choices_are_trained_anew(run):
    before, after, times = run("architecture_search", "--epochs", "10")
    assert before != after
    assert times > 1  # it is two trainings


@pytest.mark.packages
def test_a_module_of_another_package(run):
    pytest.importorskip("pytorch_forecasting")
    _, _, times = run("pytorch_forecasting_tft", "--epochs", "2")
    assert times > 0


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_are_short_and_hide_nothing(path):
    text = path.read_text()
    assert 40 <= len(text.splitlines()) <= 70
    assert "lightning.Trainer(" in text
    assert not re.search(r"^(def|from _|import _)", text, re.MULTILINE)
    assert f"python examples/{path.name}" in text


def test_the_module_of_adamw_decay_has_no_trace_of_the_package():
    text = (FOLDER / "adamw_decay.py").read_text()
    module = text[text.index("class LitClassifier") : text.index("parser =")]
    assert text.count("lightning_hpo") == 1
    assert "OnlineHPOCallback" not in module


@pytest.mark.parametrize("name", [*EPOCHS, "architecture_search"])
def test_help(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    assert "--epochs" in capsys.readouterr().out


def test_notebook(monkeypatch, tmp_path, capsys):
    """Its code cells run one after another, as Jupyter would run them."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    cells = json.loads((FOLDER / "notebook.ipynb").read_text())["cells"]
    names = {}
    try:
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                source = "".join(cell["source"]).replace("max_epochs=300", "max_epochs=10")
                exec(compile(source, f"cell {number}", "exec"), names)
    finally:
        torch.set_default_dtype(torch.float64)
    assert len(names["callback"].history) > 1
    assert set(names["values"]) == {"l2"}
    assert "test loss" in capsys.readouterr().out
