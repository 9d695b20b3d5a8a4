"""A YAML file configures everything, and what it gets wrong is rejected by name before training."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import re
import shlex
import sys
from pathlib import Path
from typing import get_args

import lightning
import pytest
import torch
import yaml

from lightning_hpo import T1T2, ClipR, Implicit, OnlineHPOCallback, UnrollK
from lightning_hpo.compatibility import DERIVATIVES
from lightning_hpo.derivatives import BACKENDS
from lightning_hpo.estimators.unroll import MODES

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")
pytest.importorskip("sklearn", reason="examples/cli reads scikit-learn's digits")

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / "examples/cli/config.yaml").read_text())
COMMAND = "python examples/cli/main.py fit --config examples/cli/config.yaml"
CALLBACK = "--trainer.callbacks."


@pytest.fixture(scope="module")
def example():
    """The module ``examples/cli/main.py``."""
    spec = importlib.util.spec_from_file_location("cli_main", ROOT / "examples/cli/main.py")
    module = sys.modules["cli_main"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _as_from_a_shell(monkeypatch):
    """The precision of the example's data, and no arguments of pytest for LightningCLI to see."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "argv", ["main.py"])


def changed(changes: dict) -> dict:
    """Returns the example's configuration with other arguments of the callback."""
    config = copy.deepcopy(CONFIG)
    config["trainer"]["callbacks"][0]["init_args"].update(changes)
    return config


def estimator(cls: type, **arguments) -> dict:
    config = {"class_path": f"lightning_hpo.{cls.__name__}", "init_args": arguments}
    return {"estimator": config, "every_n_steps": None}


def parse(example, folder, config: dict, *args: str):
    """Parses and instantiates, and does not train."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return example.CLI(
        example.LitDigits,
        example.Digits,
        args=["--config", str(path), *args],
        run=False,
        save_config_callback=None,
    )


def callback_of(cli) -> OnlineHPOCallback:
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, OnlineHPOCallback))
    return callback


def lambda_optimizer(callback: OnlineHPOCallback) -> torch.optim.Optimizer:
    """Makes the λ-optimizer as the start of a training does."""
    return callback._optimizer_factory([torch.zeros(2)])


# ------------------------------------------------------------------------------------ the example


@pytest.mark.parametrize(
    "name", ["examples/guide/first_run.md", "examples/cli/main.py", "examples/cli/config.yaml"]
)
def test_the_one_line_is_written_wherever_it_is_looked_for(name):
    lines = [line.strip("# ") for line in (ROOT / name).read_text().splitlines()]
    assert COMMAND in lines


def test_the_one_line_trains_and_tunes(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    cli = example.main(
        [
            *shlex.split(COMMAND)[2:],
            "--trainer.max_steps=14",
            "--trainer.limit_val_batches=1",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    callback = callback_of(cli)
    assert isinstance(callback.estimator, ClipR)
    assert [record.step for record in callback.history] == [11, 12, 13, 14]  # after the warm-up
    values = [record.values["l2"] for record in callback.history]
    assert all(after < before for before, after in zip([0.1, *values], values, strict=False))
    assert "{'l2': '" in capsys.readouterr().out

    # What Lightning saves beside the logs describes the same run.
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    again = callback_of(parse(example, tmp_path, {k: saved[k] for k in CONFIG}))
    assert vars(again.estimator).items() <= vars(callback.estimator).items()
    assert (again.every_n_steps, again.warmup_steps) == (1, 10)
    assert lambda_optimizer(again).defaults == lambda_optimizer(callback).defaults


FIRST_RUN = (ROOT / "examples/guide/first_run.md").read_text()
FIRST_STEPS = [
    "--trainer.max_steps=12",
    "--trainer.limit_val_batches=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
]


def test_the_yaml_of_the_guide_trains_and_tunes(example, tmp_path):
    """As it stands on the page, in the place of the callback in the example's file."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```", FIRST_RUN, re.DOTALL | re.MULTILINE)
    other = copy.deepcopy(CONFIG)
    del other["trainer"]["callbacks"]
    for name, content in {"other": yaml.safe_dump(other), "page": text}.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    files = [f"--config={tmp_path / name}.yaml" for name in ("other", "page")]
    folder = f"--trainer.default_root_dir={tmp_path}"
    callback = callback_of(example.main(["fit", *files, *FIRST_STEPS, folder]))
    assert yaml.safe_load(text)["trainer"]["callbacks"] == CONFIG["trainer"]["callbacks"]
    assert (callback.estimator.radius, callback.estimator.decay) == (20.0, 0.99)
    assert [record.step for record in callback.history] == [11, 12]  # after the warm-up


def test_the_overrides_of_the_guide_do(example, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = re.findall(r"`(--trainer\.callbacks\.[^`]+)`", FIRST_RUN)
    folder = f"--trainer.default_root_dir={tmp_path}"
    cli = example.main([*shlex.split(COMMAND)[2:], *overrides, *FIRST_STEPS, folder])
    callback = callback_of(cli)
    assert isinstance(callback.estimator, T1T2)
    assert lambda_optimizer(callback).defaults["lr"] == 0.05
    assert [record.step for record in callback.history] == [11, 12]


def test_print_config_round_trips(example, tmp_path, capsys):
    def printed(config: dict) -> dict:
        with pytest.raises(SystemExit) as stopped:
            parse(example, tmp_path, config, "--print_config")
        assert not stopped.value.code
        return yaml.safe_load(capsys.readouterr().out)

    changes = {
        **estimator(ClipR, radius=math.inf),
        "optimizer_hyperparameters": ["lr"],
        "validation_loss": "torch.nn.functional.cross_entropy",
    }
    once = printed(changed(changes))
    arguments = once["trainer"]["callbacks"][0]["init_args"]
    assert arguments["estimator"]["init_args"] == {
        "radius": math.inf,
        "decay": 1.0,
        "stride": 1,
        "sync_tangents": True,
    }
    assert arguments["optimizer_hyperparameters"] == ["lr"]
    assert arguments["optimizer"]["init_args"]["lr"] == 0.02
    assert printed(once) == once


def test_the_default_lambda_optimizer_round_trips(example, tmp_path, capsys):
    config = changed({})
    del config["trainer"]["callbacks"][0]["init_args"]["optimizer"]
    with pytest.raises(SystemExit):
        parse(example, tmp_path, config, "--print_config")
    again = callback_of(parse(example, tmp_path, yaml.safe_load(capsys.readouterr().out)))
    assert isinstance(lambda_optimizer(again), torch.optim.Adam)
    assert lambda_optimizer(again).defaults["lr"] == 0.01


# ------------------------------------------------------------------------------- what can be set


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (T1T2, {"scale_by_lr": False}),
        (ClipR, {"radius": 5, "decay": 0.5, "stride": 3}),
        *((UnrollK, {"k": 4, "mode": mode, "restart": True}) for mode in MODES),
        (Implicit, {"solver": "cg", "iterations": 3, "damping": 0.1, "tolerance": 1e-3}),
        (Implicit, {"solver": "neumann"}),
    ],
)
def test_every_estimator_from_yaml(example, tmp_path, cls, arguments):
    callback = callback_of(parse(example, tmp_path, changed(estimator(cls, **arguments))))
    assert type(callback.estimator) is cls
    assert arguments.items() <= vars(callback.estimator).items()


@pytest.mark.parametrize("derivatives", DERIVATIVES)
def test_the_callbacks_own_arguments_from_yaml(example, tmp_path, derivatives):
    changes = {"every_n_steps": 3, "warmup_steps": 7, "derivatives": derivatives}
    callback = callback_of(parse(example, tmp_path, changed(changes)))
    assert changes.items() <= vars(callback).items()


def test_derivatives_are_named_once_for_all():
    assert set(DERIVATIVES) == {"auto", *BACKENDS}
    assert (
        get_args(
            inspect.signature(OnlineHPOCallback, eval_str=True).parameters["derivatives"].annotation
        )
        == DERIVATIVES
    )


def test_optimizer_hyperparameters_from_yaml(example, tmp_path):
    """As a list of names, and with a Hyperparameter each."""
    names = callback_of(
        parse(example, tmp_path, changed({"optimizer_hyperparameters": ["lr", "momentum"]}))
    )
    assert list(names._option_names) == ["lr", "momentum"]
    bounded = {
        "class_path": "lightning_hpo.Hyperparameter",
        "init_args": {
            "init": 0.1,
            "constraint": {
                "class_path": "lightning_hpo.Interval",
                "init_args": {"low": 0.0, "high": 0.5},
            },
        },
    }
    mapping = callback_of(
        parse(example, tmp_path, changed({"optimizer_hyperparameters": {"lr": bounded}}))
    )
    assert mapping._option_names["lr"]().item() == pytest.approx(0.1)
    assert mapping._option_names["lr"].constraint.high == 0.5


def test_overrides_on_the_command_line(example, tmp_path):
    cli = parse(
        example,
        tmp_path,
        CONFIG,
        CALLBACK + "every_n_steps=4",
        CALLBACK + "estimator=lightning_hpo.UnrollK",
        CALLBACK + "estimator.k=4",
        CALLBACK + "optimizer=torch.optim.SGD",
        CALLBACK + "optimizer.lr=0.5",
        CALLBACK + "optimizer_hyperparameters=[lr]",
        "--model.l2=0.01",
    )
    callback = callback_of(cli)
    assert isinstance(callback.estimator, UnrollK)
    assert (callback.estimator.k, callback.every_n_steps, callback.warmup_steps) == (4, 4, 10)
    assert isinstance(lambda_optimizer(callback), torch.optim.SGD)
    assert lambda_optimizer(callback).defaults["lr"] == 0.5
    assert list(callback._option_names) == ["lr"]
    assert cli.model.l2().item() == pytest.approx(0.01)


def test_one_argument_of_an_estimator_on_the_command_line(example, tmp_path):
    callback = callback_of(parse(example, tmp_path, CONFIG, CALLBACK + "estimator.radius=.inf"))
    assert (callback.estimator.radius, callback.estimator.decay) == (math.inf, 0.99)


# ---------------------------------------------------------------------------- what is rejected


@pytest.fixture
def rejection(example, tmp_path, monkeypatch, capsys):
    """Runs the subcommand ``fit``; returns the message of its rejection."""
    fits = []
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *args, **kwargs: fits.append(args))

    def run(config: dict, *args: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        with pytest.raises((SystemExit, ValueError)) as stopped:
            example.main(["fit", "--config", str(path), *args])
        assert not fits
        if isinstance(stopped.value, ValueError):
            return str(stopped.value)
        assert stopped.value.code == 2
        message = capsys.readouterr().err.rpartition("error: ")[2]
        return message.partition("Given value type")[0]  # which would show the name in any case

    return run


def adam(**arguments) -> dict:
    return {"optimizer": {"class_path": "torch.optim.Adam", "init_args": arguments}}


WRONG = {
    "class of the estimator": (
        {"estimator": {"class_path": "torch.nn.Identity"}},
        ['key "estimator"', "torch.nn.Identity", "subclass of Estimator"],
    ),
    "estimator that does not exist": (
        {"estimator": {"class_path": "lightning_hpo.ClipX"}},
        ['key "estimator"', "ClipX"],
    ),
    "abstract estimator": (
        {"estimator": {"class_path": "lightning_hpo.Estimator"}},
        ["Estimator", "abstract"],
    ),
    "argument of the estimator": (estimator(ClipR, raduis=5.0), ['key "estimator"', "'raduis'"]),
    "missing argument": (estimator(UnrollK), ['key "estimator"', "required: k"]),
    "type": (estimator(ClipR, radius="big"), ['key "radius"', "float", "big"]),
    "choice": (estimator(Implicit, solver="lu"), ['key "solver"', "cg", "neumann", "lu"]),
    "range": (estimator(ClipR, radius=-1.0), ["ClipR: radius=-1.0", "positive"]),
    "argument of the callback": ({"every_n_step": 1}, ["'every_n_step'"]),
    "type for the callback": ({"every_n_steps": "often"}, ['key "every_n_steps"', "int"]),
    "choice for the callback": (
        {"derivatives": "sideways"},
        ['key "derivatives"', *DERIVATIVES, "sideways"],
    ),
    "range for the callback": ({"warmup_steps": -1}, ["warmup_steps=-1", "at least 0"]),
    "optimizer that does not exist": (
        {"optimizer": {"class_path": "torch.optim.Adm"}},
        ['key "optimizer"', "Adm"],
    ),
    "class of the optimizer": (
        {"optimizer": {"class_path": "lightning_hpo.ClipR"}},
        ['key "optimizer"', "lightning_hpo.ClipR"],
    ),
    "argument of the optimizer": (adam(lrr=0.1), ['key "optimizer"', "'lrr'"]),
    "type for the optimizer": (adam(lr="fast"), ['key "optimizer"', 'key "lr"', "float", "fast"]),
    "names in a string": (
        {"optimizer_hyperparameters": "lr"},
        ['key "optimizer_hyperparameters"'],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_yaml_is_rejected_with_the_arguments_name(rejection, case):
    changes, expected = WRONG[case]
    message = rejection(changed(changes))
    for text in expected:
        assert text in message


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["estimator=torch.nn.Identity"], ['key "estimator"', "subclass of Estimator"]),
        (["estimator.raduis=5"], ['key "estimator"', "'raduis'"]),
        (["estimator.radius=big"], ['key "radius"', "float"]),
        (["optimizer=torch.optim.Adm"], ['key "optimizer"', "Adm"]),
        (["optimizer.lrr=1"], ['key "optimizer"', "'lrr'"]),
        (["derivatives=sideways"], ['key "derivatives"', *DERIVATIVES]),
        (["every_n_step=5"], ["'every_n_step'"]),
    ],
)
def test_wrong_overrides_are_rejected_with_the_arguments_name(rejection, args, expected):
    message = rejection(CONFIG, *(CALLBACK + arg for arg in args))
    for text in expected:
        assert text in message


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (cls, name)
        for cls in (OnlineHPOCallback, T1T2, ClipR, UnrollK, Implicit)
        for name in inspect.signature(cls).parameters
    ],
)
def test_every_argument_has_a_type_that_is_checked(rejection, cls, name):
    value = {"no": ["such", {"value": 1}]}
    known = {"k": 2} if cls is UnrollK else {}
    changes = (
        {name: value} if cls is OnlineHPOCallback else estimator(cls, **(known | {name: value}))
    )
    assert f'key "{name}"' in rejection(changed(changes))


def test_a_right_configuration_is_not_rejected(example, tmp_path, monkeypatch):
    """So that the rejections above are due to what each case changes."""
    fits = []
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *args, **kwargs: fits.append(args))
    monkeypatch.setattr(example.CLI, "after_fit", lambda self: None)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(changed({})))
    example.main(["fit", "--config", str(path)])
    assert len(fits) == 1
