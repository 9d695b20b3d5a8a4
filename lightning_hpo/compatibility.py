"""The checks at setup: what is refused, why, and what to do instead."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_hpo.distributed import is_fully_sharded, is_sharded
from lightning_hpo.dynamics import Dynamics, GenericDynamics, OptimizerStep, is_elementwise
from lightning_hpo.estimators import Estimator
from lightning_hpo.hyperparameters import Hyperparameter, named_hyperparameters
from lightning_hpo.regularizers import IndexedDataset, Penalty, PenaltyMixin
from lightning_hpo.regularizers.constants import SHARDED

# Spelled out, so that type checkers and LightningCLI know the names of the backends.
Derivatives = Literal["auto", "reverse", "forward", "finite_difference"]
DERIVATIVES = get_args(Derivatives)

# Optimizers whose step is no differentiable function of one gradient.
_REFUSED_OPTIMIZERS = {
    "LBFGS": "evaluates its closure several times per step",
    "SparseAdam": "works on sparse gradients",
    "Adafactor": "reads norms as Python numbers, through which no derivative passes",
}


# Hooks of modules and callbacks between the start of a batch and the optimizer's step.
_BETWEEN = (
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
)


def check_trainer(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    names: Sequence[str],
    derivatives: str,
) -> list[str]:
    """Lists what is wrong with the way that the training is set up, before any data are read.

    Args:
        trainer: The trainer, with its optimizers in place.
        module: The LightningModule.
        names: What is to be tuned.
        derivatives: The callback's argument.

    Returns:
        One sentence per finding; empty if all is well.
    """
    findings = []
    if not names:
        findings.append(
            f"{type(module).__name__} has no Hyperparameter to tune. Register one, for example "
            "with self.register_l2(init=1e-4) of L2Mixin, or assign a Hyperparameter to an "
            "attribute"
        )
    if not module.automatic_optimization:
        findings.append(
            "The module uses manual optimization (automatic_optimization=False): replaying its "
            "training_step would run its own optimizer.step(). Use automatic optimization"
        )
    findings += check_strategy(trainer.strategy)
    if len(trainer.optimizers) != 1:
        findings.append(
            f"configure_optimizers returned {len(trainer.optimizers)} optimizers, expected one. "
            "Use one optimizer with several parameter groups"
        )
    for optimizer in trainer.optimizers:
        findings += check_optimizer(optimizer)
        findings += check_sharding(trainer.strategy, module, optimizer, derivatives)
    clips = {
        f"{type(owner).__name__} overrides {hook}"
        for owner, hook, kind in (
            (module, "configure_gradient_clipping", pl.LightningModule),
            (module, "clip_gradients", pl.LightningModule),
            *(
                (trainer.precision_plugin, hook, Precision)
                for hook in ("clip_gradients", "clip_grad_by_norm", "clip_grad_by_value")
            ),
        )
        if _overrides(owner, hook, kind) and (owner is module or _is_foreign(owner))
    }
    for clip in sorted(clips):
        findings.append(
            f"{clip}, whose derivative is unknown. Use Trainer(gradient_clip_val=..., "
            "gradient_clip_algorithm=...), or clip in on_before_optimizer_step only what need not "
            "be differentiated"
        )
    return findings


def check_strategy(strategy: Any) -> list[str]:
    """Refuses strategies that hide the parameters and their gradients from the module."""
    if not isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        return []
    return [
        f"{type(strategy).__name__} flattens or partitions the parameters in a way that replays "
        "cannot follow. Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) "
        "with fully_shard in configure_model, or strategy='ddp'"
    ]


def check_sharding(
    strategy: Any, module: pl.LightningModule, optimizer: torch.optim.Optimizer, derivatives: str
) -> list[str]:
    """Lists what cannot be followed where ``fully_shard`` splits the parameters over the ranks."""
    named = {id(p): name for name, p in module.named_parameters()}
    theta = [p for group in optimizer.param_groups for p in group["params"]]
    is_model_parallel = isinstance(strategy, ModelParallelStrategy)
    if not (is_model_parallel or is_sharded(theta)):
        return []
    findings = []
    if derivatives not in ("auto", "finite_difference"):
        findings.append(
            f"derivatives={derivatives!r} needs the graph of the gradient over whole parameters, "
            "which sharded parameters do not have. Use derivatives='finite_difference' or 'auto'"
        )
    split = strategy.device_mesh["tensor_parallel"].size() if is_model_parallel else 1
    if split > 1:
        findings.append(
            f"ModelParallelStrategy splits layers by tensor parallelism over {split} processes, "
            "which is not supported. Use ModelParallelStrategy(data_parallel_size=the number of "
            "processes, tensor_parallel_size=1) with fully_shard in configure_model"
        )
    others = (
        [] if split > 1 else [named.get(id(p), "one") for p in theta if not is_fully_sharded(p)]
    )
    if others:
        findings.append(
            f"{len(others)} of the {len(theta)} parameters that are trained ({others[0]} is the "
            "first) are not sharded over all processes along one dimension. Apply fully_shard to "
            "the whole network in configure_model, over one mesh of all processes: "
            "self.device_mesh['data_parallel']"
        )
    elif any(p.device.type != strategy.root_device.type for p in theta):
        findings.append(
            "The sharded parameters are offloaded to the CPU, where tangents cannot follow. Call "
            "fully_shard without an offload policy"
        )
    if getattr(module, "loss_penalties", ()):
        findings.append(
            "A penalty is registered with inside_loss=True, but inside training_step each process "
            "sees only its shard of the weights. Register it without inside_loss, and remove "
            "self.penalty() from the loss: θ and λ are the same"
        )
    strengths = [p.hyperparameter for p in gradient_penalties(module) if p.has_constants]
    with_constants = [n for n, h in named_hyperparameters(module).items() if h in strengths]
    if with_constants:
        findings.append(f"{SHARDED} (here {', '.join(map(repr, with_constants))})")
    if not is_elementwise(type(optimizer)):
        findings.append(
            f"The step of {type(optimizer).__name__} may mix the elements of a parameter, so it "
            "cannot be followed where parameters are sharded. Use SGD, Adam, AdamW or another "
            "elementwise optimizer of torch.optim, or strategy='ddp'"
        )
    return findings


def check_optimizer(optimizer: torch.optim.Optimizer) -> list[str]:
    """Refuses optimizers whose step cannot be differentiated, and those that move nothing."""
    if not any(group["params"] for group in optimizer.param_groups):
        return [
            "configure_optimizers returned no optimizer, or one without parameters. Use one that "
            "moves the parameters of the module"
        ]
    for kind in type(optimizer).__mro__:
        if kind.__module__.startswith("torch.optim") and kind.__name__ in _REFUSED_OPTIMIZERS:
            return [
                f"The optimizer {type(optimizer).__name__} {_REFUSED_OPTIMIZERS[kind.__name__]}, "
                "so that tangents cannot follow it. Use SGD, Adam, AdamW, RMSprop or another "
                "elementwise optimizer"
            ]
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return [
            f"The optimizer {type(optimizer).__name__} needs a closure: it takes several gradients "
            "per step, so that tangents cannot follow it. Use SGD, Adam, AdamW, RMSprop or another "
            "elementwise optimizer"
        ]
    return []


def check_step(dynamics: Dynamics, step: OptimizerStep) -> list[str]:
    """Refuses an optimizer of another library whose step has no derivative, before it moves θ."""
    kind = type(dynamics.optimizer)
    if (
        not isinstance(dynamics, GenericDynamics)
        or kind.__module__.startswith("torch.optim")
        or dynamics.is_differentiable_at(step)
    ):
        return []
    return [
        f"Tangents cannot follow the optimizer {kind.__name__}: its step works on .data, disables "
        "gradients or draws random numbers inside, or keeps its state outside of optimizer.state. "
        "Use an optimizer of torch.optim, or write its step with in-place operations on p, p.grad "
        "and self.state[p]"
    ]


def check_untouched(
    module: pl.LightningModule, theta: Sequence[Tensor], versions: Sequence[int]
) -> list[str]:
    """Refuses steps that write to trained parameters, which a replay would do again.

    Args:
        module: The LightningModule.
        theta: The parameters that the optimizer moves.
        versions: Their versions before the steps were evaluated.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    written = [
        names.get(id(p), "one")
        for p, version in zip(theta, versions, strict=True)
        if p._version != version and not is_sharded([p])
    ]
    if not written:
        return []
    return [
        f"training_step or validation_step writes to the trained parameter {written[0]!r} in place "
        "(as nn.Embedding(max_norm=...) does in its forward pass); replays of the step and held-out"
        " batches would write to it too. Do that in on_train_batch_end"
    ]


def check_dependence(
    module: pl.LightningModule,
    hyperparameters: dict[str, Hyperparameter],
    in_loss: set[str],
    penalties: Sequence[Penalty],
    theta: Sequence[Tensor],
) -> list[str]:
    """Lists the hyperparameters that have no effect on the training.

    A penalty on weights that are frozen now is warned about, where there is something else to tune.

    Args:
        module: The LightningModule.
        hyperparameters: Those found in it.
        in_loss: The names of those that the training loss depends on.
        penalties: The penalties that act in the gradient.
        theta: The parameters that the optimizer moves.

    Returns:
        One sentence per finding.
    """
    trained = {id(p) for p in theta if p.requires_grad}
    acting = {id(p.hyperparameter) for p in penalties if any(id(w) in trained for w in p.weights)}
    tuned = {id(h) for h in hyperparameters.values()}
    idle = {id(p.hyperparameter) for p in penalties} & tuned - acting
    in_penalty_term = {id(p.hyperparameter) for p in getattr(module, "loss_penalties", ())}
    findings = []
    for name, h in hyperparameters.items():
        if name in in_loss or id(h) in acting:
            continue
        if id(h) in idle and len(idle) < len(hyperparameters):
            # Fine-tuning unfreezes them later.
            warnings.warn(
                f"OnlineHPOCallback: the hyperparameter {name!r} has no effect as long as the "
                "weights that it acts on are not trained by the optimizer",
                stacklevel=2,
            )
            continue
        if id(h) in idle:
            reason = "the weights that it acts on are not trained by the optimizer"
        elif id(h) in in_penalty_term:
            reason = (
                "it is registered with inside_loss=True, but training_step does not add "
                "self.penalty() to its loss"
            )
        else:
            reason = (
                "the loss of training_step on its first batch does not depend on it; call it there "
                f"(its value is self.{name}()), or remove it"
            )
        findings.append(f"The hyperparameter {name!r} has no effect on the training: {reason}")
    return findings


def compare_checkpoint(
    state: Mapping[str, Any],
    hyperparameters: Mapping[str, Hyperparameter],
    estimator: str,
    optimizer: str,
) -> dict[str, str]:
    """Lists in what a checkpoint differs from the training that resumes from it.

    Args:
        state: The state of the callback that was saved.
        hyperparameters: Those that are tuned now.
        estimator: The present kind of estimator.
        optimizer: The present class of the λ-optimizer.

    Returns:
        One sentence for each of ``"hyperparameters"``, ``"estimator"`` and ``"optimizer"`` that
        differs.
    """
    remedy = (
        "Resume with what was saved, or pass strict=False to OnlineHPOCallback to go on with what "
        "fits"
    )
    here = {name: list(h.raw.shape) for name, h in hyperparameters.items()}
    differences = {}
    if state["hyperparameters"] != here:
        differences["hyperparameters"] = (
            f"The checkpoint tunes {_shapes(state['hyperparameters'])}, this training "
            f"{_shapes(here)}. {remedy}"
        )
    if state["estimator"]["kind"] != estimator:
        differences["estimator"] = (
            f"The checkpoint was written by the estimator {state['estimator']['kind']}, this "
            f"training uses {estimator}. {remedy}"
        )
    if state["optimizer"]["kind"] != optimizer:
        differences["optimizer"] = (
            f"The checkpoint was written with the λ-optimizer {state['optimizer']['kind']}, this "
            f"training uses {optimizer}. {remedy}"
        )
    return differences


def _shapes(hyperparameters: Mapping[str, list[int]]) -> str:
    return ", ".join(
        f"{name!r}" + (f" of shape {tuple(shape)}" if shape else "")
        for name, shape in hyperparameters.items()
    )


def refuse(findings: Iterable[str]) -> None:
    """Raises one error for all findings.

    Raises:
        MisconfigurationException: If there is any finding.
    """
    findings = list(findings)
    if findings:
        raise MisconfigurationException(
            "OnlineHPOCallback cannot run here:\n" + "\n".join(f"  - {f}" for f in findings)
        )


def gradient_penalties(module: pl.LightningModule) -> list[Penalty]:
    """Collects the penalties that act in the gradient."""
    return module.gradient_penalties if isinstance(module, PenaltyMixin) else []


def check_example_weights(module: pl.LightningModule, loaders: Any) -> list[str]:
    """Lists training sets that have more examples than there are example weights.

    Only an :class:`~lightning_hpo.regularizers.IndexedDataset`, whole, in part or in a
    concatenation, can be checked: what other datasets yield as an index is not known before their
    batches come.

    Args:
        module: The LightningModule.
        loaders: The training dataloaders, in any structure.
    """
    name = vars(module).get("_hpo_example_weights")
    if name is None:
        return []
    count = module.get_submodule(name).raw.numel()  # type: ignore[operator]
    findings = []
    for loader in CombinedLoader(loaders, "sequential").flattened:
        parts = list(_indices(getattr(loader, "dataset", None)))
        if len(parts) > 1:
            findings.append(
                "The training set concatenates several IndexedDatasets, whose examples would share "
                "weights; wrap the whole: IndexedDataset(ConcatDataset([...]))"
            )
        elif parts and max(parts[0], default=0) >= count:
            findings.append(
                f"There are {count} example weights, but the training set has the index "
                f"{max(parts[0])}; use register_example_weights({max(parts[0]) + 1})"
            )
    return findings


def _indices(dataset: Any) -> Iterator[Sequence[int]]:
    """Yields the indices that a dataset can give out, for each IndexedDataset in it."""
    if isinstance(dataset, IndexedDataset):
        yield range(len(dataset))
    elif isinstance(dataset, Subset):
        for inner in _indices(dataset.dataset):
            yield [inner[i] for i in dataset.indices if i < len(inner)]
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _indices(part)


def may_change_gradients(
    trainer: pl.Trainer, module: pl.LightningModule, callback: pl.Callback
) -> bool:
    """Whether some hook may change the gradient between the backward pass and this callback."""
    others = [c for c in trainer.callbacks if c is not callback]  # type: ignore[attr-defined]
    return (
        any(
            _overrides(module, hook, pl.LightningModule)
            for hook in ("backward", "on_after_backward", "optimizer_zero_grad")
        )
        or any(
            _overrides(other, hook, pl.Callback)
            for other in others
            for hook in ("on_after_backward", "on_before_optimizer_step")
        )
        or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters())
    )


def _overrides(owner: Any, hook: str, *kinds: type) -> bool:
    """Whether a hook of an object, its own or its class's, is none of the given classes."""
    inherited = getattr(type(owner), hook, None)
    return hook in vars(owner) or all(inherited is not getattr(k, hook, None) for k in kinds)


def _is_foreign(plugin: Any) -> bool:
    """Whether a plugin or strategy is not one of Lightning itself."""
    return not type(plugin).__module__.startswith(("lightning.", "lightning_fabric."))


def may_interfere(trainer: pl.Trainer, module: pl.LightningModule, callback: pl.Callback) -> bool:
    """Whether some hook stands between the start of a batch and the optimizer's step.

    It may change parameters, gradients or what the loss depends on: a step can then be replayed at
    the start of its batch only.
    """
    (optimizer,) = trainer.optimizers
    return (
        any(_overrides(module, hook, PenaltyMixin, pl.LightningModule) for hook in _BETWEEN)
        or any(
            _overrides(other, hook, pl.Callback)
            for other in trainer.callbacks  # type: ignore[attr-defined]
            if other is not callback
            for hook in _BETWEEN
        )
        or any(p._post_accumulate_grad_hooks for p in module.parameters())
        or _is_foreign(trainer.precision_plugin)
        or _is_foreign(trainer.strategy)
        or len(optimizer._optimizer_step_pre_hooks) > 1  # one is that of the callback
        or bool(_global_optimizer_pre_hooks)
    )


def check_arguments(
    estimator: Any,
    optimizer: Any,
    dataloader: Any,
    derivatives: Any,
    validation_loss: Any,
    optimizer_hyperparameters: Any,
    flags: Mapping[str, Any],
) -> None:
    """Checks the kinds of the callback's arguments.

    Raises:
        TypeError: If one is of the wrong kind.
        ValueError: If ``derivatives`` is unknown.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"OnlineHPOCallback: estimator={estimator!r}, expected an instance of an Estimator, "
            "for example ClipR(radius=20.0)"
        )
    if not callable(optimizer):
        raise TypeError(
            f"OnlineHPOCallback: optimizer={optimizer!r}, expected a callable from a list of "
            "tensors to a torch.optim.Optimizer"
        )
    if isinstance(dataloader, (Dataset, Iterator)):
        raise TypeError(
            f"OnlineHPOCallback: dataloader is a {type(dataloader).__name__}, expected a "
            "DataLoader, or another iterable of batches that can be iterated again and again"
        )
    if validation_loss is not None and not callable(validation_loss):
        raise TypeError(
            f"OnlineHPOCallback: validation_loss={validation_loss!r}, expected a function of the "
            "module and a batch; the name of a logged value goes to monitor="
        )
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"OnlineHPOCallback: {name}={flag!r}, expected True or False")
    if derivatives not in DERIVATIVES:
        raise ValueError(
            f"OnlineHPOCallback: derivatives={derivatives!r}, expected one of {DERIVATIVES}"
        )
    check_option_names(optimizer_hyperparameters)


def check_numbers(**numbers: tuple[Any, int]) -> None:
    """Checks arguments of the callback that are integers, each given with its least value.

    Raises:
        TypeError: If one is no integer.
        ValueError: If one is too small.
    """
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"OnlineHPOCallback: {name}={value!r}, expected an integer")
        if value < least:
            raise ValueError(f"OnlineHPOCallback: {name}={value}, expected at least {least}")


def check_window(estimator: Estimator, every_n_steps: int) -> None:
    """Checks that the estimator's window fits between two updates.

    Raises:
        ValueError: If it does not.
    """
    if estimator.window is not None and every_n_steps < estimator.window:
        raise ValueError(
            f"OnlineHPOCallback: every_n_steps={every_n_steps} is smaller than the window of "
            f"{estimator.window} steps of {type(estimator).__name__}; make it at least as large, "
            "or shorten the window"
        )


def check_option_names(names: Any) -> None:
    """Checks the argument ``optimizer_hyperparameters`` of the callback.

    Raises:
        TypeError: If it is neither a collection of names nor a mapping to hyperparameters.
    """
    if isinstance(names, str):
        raise TypeError(
            f"OnlineHPOCallback: optimizer_hyperparameters={names!r}, expected a list of names: "
            f"[{names!r}]"
        )
    for name, h in names.items() if isinstance(names, Mapping) else ():
        if h is not None and not isinstance(h, Hyperparameter):
            raise TypeError(
                f"OnlineHPOCallback: optimizer_hyperparameters[{name!r}] is a {type(h).__name__}, "
                "expected a Hyperparameter; for its default pass a list of names"
            )
