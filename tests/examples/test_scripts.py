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
    "transformer": 8,
}
MORE = {"transformer": ["--characters", "2000"]}
# A closing sentence has a metric before and after, and what it took.
CLOSING = (
    r"(?s)takes? the test (?:loss|accuracy) from ([\d.]+)%? to ([\d.]+)%?, in one training of "
)
CLOSING += r"([\d.]+) times the time of a plain one"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script in a folder of its own; returns what it printed last, and its picture."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)

    def run(name, *arguments):
        picture = tmp_path / f"{name}.png"
        command = [f"{name}.py", *arguments, "--output", str(picture)]
        monkeypatch.setattr(sys, "argv", command)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.strip().splitlines()[-1], picture

    yield run
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("name", EPOCHS)
def test_a_script_trains_twice_and_says_what_was_gained(run, name):
    closing, picture = run(name, "--epochs", str(EPOCHS[name]), *MORE.get(name, []))
    before, after, times = map(float, re.search(CLOSING, closing).groups())
    assert before != after  # λ has moved the training
    assert times > 0
    assert picture.stat().st_size > 5000


def test_a_text_of_ones_own(run, tmp_path):
    for part in ("train", "valid", "test"):
        (tmp_path / f"ptb.{part}.txt").write_text(f"{part} no it was n't black monday \n" * 60)
    closing, _ = run("transformer", "--epochs", "8", "--data-dir", str(tmp_path))
    assert re.search(CLOSING, closing)


@pytest.mark.packages
def test_a_module_of_another_package(run):
    pytest.importorskip("pytorch_forecasting")
    closing, picture = run("pytorch_forecasting_tft", "--epochs", "2")
    assert re.search(CLOSING, closing)
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize("name", [*EPOCHS, "pytorch_forecasting_tft"])
def test_scripts_are_short_and_hide_nothing(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 100
    assert "lightning.Trainer(" in text
    assert "from _" not in text
    assert f"python examples/{name}.py" in text


def test_the_module_of_adamw_decay_has_no_trace_of_the_package():
    text = (FOLDER / "adamw_decay.py").read_text()
    module = text[text.index("class LitClassifier") : text.index("parser =")]
    assert text.count("lightning_hpo") == 1
    assert "OnlineHPOCallback" not in module


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dropout.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / "dropout.py"), run_name="__main__")
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
