"""The checks at setup: what is refused, why, and what to do instead."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_hpo._arguments import check_choice, check_flag
from lightning_hpo._lightning import MisconfigurationException, classes
from lightning_hpo._record import record_of
from lightning_hpo._repr import listed
from lightning_hpo._trainer import is_foreign, overrides
from lightning_hpo.auto import is_adaptive, is_decoupled
from lightning_hpo.distributed import is_fully_sharded, is_sharded
from lightning_hpo.dynamics import Dynamics, GenericDynamics, OptimizerStep, is_elementwise
from lightning_hpo.estimators import Estimator, PolicyGradient, serves_choices
from lightning_hpo.hyperparameters import (
    CategoricalHyperparameter,
    Hyperparameter,
    LSTMController,
    named_hyperparameters,
)
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


def check_alone(count: int) -> list[str]:
    """Refuses several callbacks, which would all move the same λ."""
    if count <= 1:
        return []
    return [
        f"The Trainer has {count} OnlineHPOCallbacks, expected one, which tunes all that there is. "
        "Where hyperparameters need different estimators, give it those by their names: "
        "OnlineHPOCallback({'l2*': T1T2(), '*': ClipR()})"
    ]


_ONE_OPTIMIZER = (
    "Use one optimizer with several parameter groups, each with its own learning rate, under "
    "automatic optimization: torch.optim.Adam([{'params': self.encoder.parameters(), 'lr': 1e-4}, "
    "{'params': self.head.parameters(), 'lr': 1e-3}]), and return the sum of the losses from "
    "training_step. Optimizers that take turns, as in a GAN, cannot be followed"
)


def add_advice(error: BaseException) -> None:
    """Completes the message with which Lightning refuses several optimizers.

    It advises manual optimization, in which hyperparameters cannot be tuned.
    """
    if isinstance(error, RuntimeError) and "multiple optimizers" in str(error):
        error.args = (
            f"{error}\nWith OnlineHPOCallback, do not set automatic_optimization = False. "
            f"{_ONE_OPTIMIZER}",
        )


def _nothing_to_tune(module: pl.LightningModule) -> str:
    """Says why there is no hyperparameter to tune."""
    name = type(module).__name__
    frozen = [n for n, h in named_hyperparameters(module).items() if h.frozen]
    if frozen:
        return (
            f"All hyperparameters of {name} are frozen ({listed(frozen, 3)}), so that there is "
            "nothing to tune. Leave OnlineHPOCallback out to train with the values as they are, or "
            f"let one be tuned again: module.{frozen[0]}.frozen = False"
        )
    return (
        f"{name} has no Hyperparameter to tune. Register one, for example with self.register_l2() "
        "of L2Mixin, or assign a Hyperparameter to an attribute; or leave the module as it is, and "
        'tune its optimizer: OnlineHPOCallback(optimizer_hyperparameters={"weight_decay": "auto"})'
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
        findings.append(_nothing_to_tune(module))
    if not module.automatic_optimization:
        findings.append(
            "The module uses manual optimization (automatic_optimization=False): replaying its "
            "training_step would run its own optimizer.step(). Use automatic optimization"
        )
    findings += check_strategy(trainer.strategy)
    if len(trainer.optimizers) != 1:
        findings.append(
            f"configure_optimizers returned {len(trainer.optimizers)} optimizers, expected one. "
            + _ONE_OPTIMIZER
        )
    for optimizer in trainer.optimizers:
        findings += check_optimizer(optimizer)
        findings += check_sharding(trainer.strategy, module, optimizer, derivatives)
    clips = {
        f"{type(owner).__name__} overrides {hook}"
        for owner, hook, kinds in (
            (module, "configure_gradient_clipping", classes("LightningModule")),
            (module, "clip_gradients", classes("LightningModule")),
            *(
                (trainer.precision_plugin, hook, classes("plugins.Precision"))
                for hook in ("clip_gradients", "clip_grad_by_norm", "clip_grad_by_value")
            ),
        )
        if overrides(owner, hook, *kinds) and (owner is module or is_foreign(owner))
    }
    for clip in sorted(clips):
        findings.append(
            f"{clip}, whose derivative is unknown. Use Trainer(gradient_clip_val=..., "
            "gradient_clip_algorithm=...), or clip in on_before_optimizer_step only what need not "
            "be differentiated"
        )
    return findings


def check_hidden(module: pl.LightningModule, known: Collection[Hyperparameter]) -> list[str]:
    """Lists hyperparameters that are kept where a module does not look for its parts.

    Args:
        module: The LightningModule.
        known: Those that are found.

    Returns:
        One sentence per list, tuple or dict.
    """
    findings = []
    for path, part in module.named_modules():
        if isinstance(part, LSTMController):
            continue  # it refers to those that it decides, wherever they are
        for name, value in vars(part).items():
            if name.startswith("_") or not isinstance(value, (list, tuple, dict)):
                continue
            held = value.values() if isinstance(value, dict) else value
            if any(isinstance(h, Hyperparameter) and not h.frozen and h not in known for h in held):
                kind = "ModuleDict" if isinstance(value, dict) else "ModuleList"
                findings.append(
                    f"{'.'.join(filter(None, (path, name)))!r} is a {type(value).__name__} with "
                    "a Hyperparameter, in which it is not found, saved or moved to a device. Use "
                    f"torch.nn.{kind}, or assign it to an attribute of its own"
                )
    return findings


def check_steps(module: pl.LightningModule) -> list[str]:
    """Refuses training steps whose batch is not known before they run."""
    if not is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return []
    return [
        f"{type(module).__name__}.training_step takes a dataloader_iter, and fetches its batch "
        "itself, so that it cannot be replayed. Let it take (batch, batch_idx)"
    ]


class SkippedBatches:
    """Warns where batches that are None change how gradients accumulate."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._warned = False

    def look(self, batch_idx: int, accumulated: int) -> None:
        """Looks at the index of a micro-batch that Lightning trains on.

        Lightning clears the gradient with the first micro-batch of a window. Where that is None,
        the gradient of the window before stays in the next.
        """
        last, self._last = self._last, batch_idx
        if self._warned or accumulated == 1 or last is None:
            return
        last = -1 if last >= batch_idx else last  # another epoch
        first = batch_idx - batch_idx % accumulated
        if last < first < batch_idx:
            self._warned = True
            warnings.warn(
                f"OnlineHPOCallback: batch {first} was None, the first of a window of "
                f"accumulate_grad_batches={accumulated}; Lightning then adds the gradient of the "
                "window before once more, which hypergradients leave out. Let the loader leave "
                "such batches out instead of yielding None",
                stacklevel=2,
            )


def warn_of_resets(trainer: pl.Trainer, estimators: Iterable[Estimator]) -> None:
    """Warns where a callback moves the weights in a way that tangents do not see."""
    if all(estimator.window == 1 for estimator in estimators):
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        is_pruning = isinstance(callback, classes("callbacks.ModelPruning"))
        if is_pruning and getattr(callback, "_use_lottery_ticket_hypothesis", False):
            warnings.warn(
                "OnlineHPOCallback: ModelPruning(use_lottery_ticket_hypothesis=True), its default, "
                "puts the weights back to where they started, and the influence of the "
                "hyperparameters on them is overestimated from then on. Pass "
                "use_lottery_ticket_hypothesis=False to it, or use the estimator T1T2(), which "
                "looks at one step at a time",
                stacklevel=2,
            )


def check_strategy(strategy: Any) -> list[str]:
    """Refuses strategies that hide the parameters and their gradients from the module."""
    hiding = (*classes("strategies.FSDPStrategy"), *classes("strategies.DeepSpeedStrategy"))
    if not isinstance(strategy, hiding):
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
    is_model_parallel = isinstance(strategy, classes("strategies.ModelParallelStrategy"))
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
            "elementwise optimizer of torch.optim, or strategy='ddp'. If it moves each element by "
            "its own gradient and state alone, say so before the training: "
            f"{type(optimizer).__name__}.elementwise = True"
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
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(p.requires_grad for p in parameters):
        return [
            f"All {len(parameters)} parameters that the optimizer moves are frozen "
            "(requires_grad=False): nothing is trained, so that no λ has an effect. Let those "
            "that are to be trained have requires_grad_(True)"
        ]
    others = not type(optimizer).__module__.startswith("torch.optim")  # may move what it is given
    return check_complex(p for p in parameters if p.requires_grad or others)


def check_complex(
    parameters: Iterable[Tensor], module: pl.LightningModule | None = None
) -> list[str]:
    """Refuses complex parameters.

    Args:
        parameters: What the optimizer moves.
        module: The LightningModule, by which they are named.
    """
    trained = {id(p) for p in parameters if p.is_complex()}
    if not trained:
        return []
    names = [] if module is None else [n for n, p in module.named_parameters() if id(p) in trained]
    return [
        f"The optimizer moves complex parameters{f' ({names[0]!r})' if names else ''}, along which "
        "derivatives are not taken. Keep them as real parameters of shape (..., 2), and use "
        "torch.view_as_complex(p) in the forward pass: the training is the same"
    ]


def check_auto(optimizers: Sequence[torch.optim.Optimizer], tuned: Mapping[str, Any]) -> list[str]:
    """Refuses a weight decay of which nothing says how it acts."""
    if len(optimizers) != 1 or tuned.get("weight_decay") != "auto":
        return []
    (optimizer,) = optimizers
    if is_decoupled(optimizer) is not None or not is_adaptive(optimizer):
        return []
    return [
        'optimizer_hyperparameters={"weight_decay": "auto"} is not known for '
        f"{type(optimizer).__name__}, whose weight decay may act on the weights or in the "
        'gradient. Pass where it starts: {"weight_decay": Hyperparameter(0.1, Positive())}'
    ]


def check_elementwise(dynamics: Dynamics, step: OptimizerStep) -> list[str]:
    """Refuses an optimizer that declares itself elementwise and mixes elements."""
    kind = type(dynamics.optimizer)
    name = kind.__name__
    if (
        isinstance(dynamics, GenericDynamics)
        and getattr(kind, "elementwise", False)
        and not dynamics.is_elementwise_at(step)
    ):
        return [
            f"The optimizer {name} declares itself elementwise, but its step moves every second "
            "element of the flattened parameters otherwise when it is made for these alone, or "
            "keeps state that is not shaped like the parameter; expected a step that moves each "
            "element by its own gradient and state, and counts steps in a Python number or in "
            "state['step']. "
            f"Set {name}.elementwise = False: tangents then follow it whole, unless parameters are "
            "sharded"
        ]
    return []


def unfollowed(optimizer: torch.optim.Optimizer, reason: str | None) -> list[str]:
    """Refuses an optimizer whose step is not what tangents and adjoints would follow."""
    if reason is None:
        return []
    return [
        f"Tangents cannot follow the optimizer {type(optimizer).__name__}: {reason}. Use an "
        "optimizer of torch.optim, or write its step with tensor operations on p, p.grad and "
        "self.state[p], without .item(), float() or numbers that are kept elsewhere"
    ]


def check_untouched(
    module: pl.LightningModule,
    theta: Sequence[Tensor],
    before: Sequence[Tensor],
    gradients: Sequence[Tensor | None] | None,
) -> list[str]:
    """Refuses steps that write to trained parameters, which a replay would do again.

    What gets no gradient is not trained, whatever the optimizer has been given: it is put back
    after replays.

    Args:
        module: The LightningModule.
        theta: The parameters that the optimizer moves.
        before: What they held before the steps were evaluated.
        gradients: Of the training loss; None where the step has no loss.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    # Values are compared: what is written through ``.data`` is not counted as a version.
    written = [
        names.get(id(p), "one")
        for p, value, g in zip(theta, before, gradients or [None] * len(theta), strict=True)
        if g is not None and not torch.equal(p, value) and not bool(p.isnan().any())
    ]
    if not written:
        return []
    return [
        f"training_step or validation_step writes to the trained parameter {written[0]!r} in place "
        "(as nn.Embedding(max_norm=...) does in its forward pass); replays of the step and held-out"
        " batches would write to it too. Do that in step() of a subclass of the optimizer, which "
        "is differentiated; in on_train_batch_end, hypergradients take it as a constant shift"
    ]


def check_dependence(
    module: pl.LightningModule,
    hyperparameters: dict[str, Hyperparameter],
    in_loss: Set[str],
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
                f"(its value is self.{name}(), without .value, .item() or .detach(), through which "
                "no derivative passes), or remove it"
            )
        findings.append(f"The hyperparameter {name!r} has no effect on the training: {reason}")
    return findings


def check_counted_once(
    module: pl.LightningModule,
    hyperparameters: Mapping[str, Hyperparameter],
    gradients: Mapping[str, Tensor | None],
) -> list[str]:
    """Refuses a training loss that has the penalties twice.

    λ R(w) has the derivative λ' R(w) with respect to raw λ; a loss that adds it k times has k times
    that.

    Args:
        module: The LightningModule.
        hyperparameters: Those that are tuned.
        gradients: The derivative of the training loss with respect to raw λ, by name.
    """
    terms: dict[str, Tensor] = {}
    names = {id(h): name for name, h in hyperparameters.items()}
    with torch.no_grad():
        for penalty in getattr(module, "loss_penalties", ()):
            name = names.get(id(penalty.hyperparameter))
            if name is not None:
                _, first = penalty.hyperparameter.constraint.derivatives(penalty.raw)
                terms[name] = first.reshape(()) * penalty.total(penalty.weights)
    for name, term in terms.items():
        g = gradients.get(name)
        times = 0.0 if g is None or float(term) == 0 else float(g.reshape(())) / float(term)
        if round(times) > 1 and abs(times - round(times)) < 0.01:
            return [
                f"The loss of training_step contains the penalty of {name!r} {round(times)} times, "
                "expected once: it would act with another strength than is shown. Add "
                "self.penalty() once, in training_step or in what it calls"
            ]
    return []


def check_asked(
    module: pl.LightningModule, tuned: Sequence[str], asked: Set[str], *, may_be_asked: bool
) -> list[str]:
    """Lists choices that ``training_step`` never asks for.

    Args:
        module: The LightningModule.
        tuned: The names of the choices that are tuned.
        asked: Those that the step was seen to ask for.
        may_be_asked: Whether it may ask for the others under a combination that was not looked at:
            they are only warned about then.

    Returns:
        One sentence, or none.
    """
    idle = [name for name in tuned if name not in asked]
    if not idle:
        return []
    if may_be_asked:
        warnings.warn(
            f"OnlineHPOCallback: training_step of {type(module).__name__} was not seen to ask for "
            f"the choices {idle}; it asks for them under rare combinations of other choices, or "
            "never: then remove them",
            stacklevel=2,
        )
        return []
    return [
        f"The choices {idle} have no effect on the training: training_step of "
        f"{type(module).__name__} never asks for them; call them there (what is chosen is "
        f"self.{idle[0]}()), or remove them"
    ]


def warn_of_clipped_responses(trainer: pl.Trainer, estimators: Iterable[Estimator]) -> None:
    """Warns where clipping takes away what choices in the training loss do to θ."""
    if trainer.gradient_clip_val and any(
        isinstance(estimator, PolicyGradient) and estimator.response for estimator in estimators
    ):
        warnings.warn(
            f"PolicyGradient with gradient_clip_val={trainer.gradient_clip_val}: the response is "
            "linear in the gradient of the choice that was drawn, and clipping keeps the length of "
            "that. Where gradients are clipped, choices are learned by the direct gradient alone, "
            "and options of the optimizer as before; clip less, or not at all",
            stacklevel=2,
        )


def check_controllers(
    module: pl.LightningModule, choices: Mapping[str, CategoricalHyperparameter]
) -> list[str]:
    """Lists decisions of networks that are not made in this training, or made twice.

    Args:
        module: The LightningModule.
        choices: All that the training has, by name.

    Returns:
        One sentence per finding.
    """
    findings = []
    known = set(choices.values())
    made: set[Hyperparameter] = set()
    for controller in (m for m in module.modules() if isinstance(m, LSTMController)):
        for name, h in controller.decisions.items():
            if h not in known and not h.frozen:
                where = (
                    f"pass it to OnlineHPOCallback: optimizer_hyperparameters="
                    f"{{{name.removeprefix('optimizer.')!r}: …}}, the same object"
                    if name.startswith("optimizer.")
                    else "assign it to the module"
                )
                findings.append(
                    f"The LSTMController decides {name!r}, which this training does not have; "
                    f"{where}"
                )
            elif h in made:
                findings.append(
                    f"Two decisions of LSTMController are {name!r}, expected one for each choice"
                )
            made.add(h)
    return findings


def compare_checkpoint(
    state: Mapping[str, Any],
    version: int,
    hyperparameters: Mapping[str, Hyperparameter],
    estimators: Sequence[tuple[str, list[str]]],
    optimizer: str,
) -> dict[str, str]:
    """Lists in what a checkpoint differs from the training that resumes from it.

    Args:
        state: The state of the callback that was saved.
        version: The format of such a state that is written now.
        hyperparameters: Those that are tuned now.
        estimators: The present kinds of estimators, each with the names that it serves.
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
    if state.get("format") != version:
        differences["estimator"] = (
            "The checkpoint was written by other code of lightning_hpo (its callback state has the "
            f"format {state.get('format', 1)}, expected {version}), whose estimator cannot be "
            "continued. Resume with the version that wrote it, or pass strict=False to "
            "OnlineHPOCallback to go on with a new one"
        )
    else:
        saved = [(each["kind"], each["names"]) for each in state["estimators"]]
        if saved != list(estimators):
            differences["estimator"] = (
                f"The checkpoint was written by the estimator {_kinds(saved)}, this training uses "
                f"{_kinds(estimators)}. {remedy}"
            )
    if state["optimizer"]["kind"] != optimizer:
        differences["optimizer"] = (
            f"The checkpoint was written with the λ-optimizer {state['optimizer']['kind']}, this "
            f"training uses {optimizer}. {remedy}"
        )
    return differences


def _kinds(estimators: Sequence[tuple[str, list[str]]]) -> str:
    if len(estimators) == 1:
        return estimators[0][0]
    return ", ".join(f"{kind} for {names}" for kind, names in estimators)


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
    name = record_of(module).example_weights
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


def assign(
    estimators: Mapping[str, Estimator], names: Sequence[str], frozen: Sequence[str]
) -> tuple[list[tuple[str, Estimator, list[str]]], list[str]]:
    """Finds the estimator of each hyperparameter: that of the first pattern that fits its name.

    Args:
        estimators: By patterns of names, as in :mod:`fnmatch`.
        names: The hyperparameters that are tuned.
        frozen: Those that are not, which a pattern may be meant for all the same.

    Returns:
        The patterns and estimators that serve any, in their order, each with its names; and one
        sentence per finding: names that no pattern matches, and patterns that match nothing, or
        nothing that an earlier one has left.
    """
    served: dict[str, list[str]] = {pattern: [] for pattern in estimators}
    left = []
    for name in (*names, *frozen):
        fits = [pattern for pattern in estimators if fnmatchcase(name, pattern)]
        if fits:
            served[fits[0]].append(name)
        elif name not in frozen:
            left.append(name)
    findings = []
    if left:
        findings.append(
            f"No pattern of estimator={list(estimators)} matches the hyperparameters {left}. Add "
            "one for them, for example '*' as the last"
        )
    idle = [pattern for pattern, own in served.items() if not own]
    if idle and names:
        findings.append(
            f"The patterns {idle} of estimator={list(estimators)} match no hyperparameter that an "
            f"earlier pattern has left; the names are {list(names)}. Correct or remove them"
        )
    tuned = {pattern: [name for name in own if name in names] for pattern, own in served.items()}
    return [(pattern, estimators[pattern], own) for pattern, own in tuned.items() if own], findings


def assign_choices(
    assigned: Sequence[tuple[str, Estimator, list[str]]], choices: Collection[str]
) -> tuple[list[tuple[str, Estimator, list[str]]], list[str]]:
    """Gives choices among what is tuned to a :class:`PolicyGradient` with the estimator named.

    Args:
        assigned: As :func:`assign` returns them.
        choices: The names of the categorical hyperparameters.

    Returns:
        The same with choices apart, and one sentence per finding.
    """
    result: list[tuple[str, Estimator, list[str]]] = []
    findings = []
    for pattern, estimator, names in assigned:
        own = [name for name in names if name in choices]
        others = [name for name in names if name not in choices]
        is_policy = isinstance(estimator, PolicyGradient)
        if is_policy and others:
            findings.append(
                f"PolicyGradient learns choices, but {others} are none. "
                + (
                    f"Give them an estimator of their own: {{{own[0]!r}: PolicyGradient(), "
                    "'*': T1T2()}"
                    if own
                    else "Use another estimator for them, for example T1T2(); a choice is made by "
                    "a CategoricalHyperparameter([...]) that training_step calls"
                )
            )
        if own and not is_policy and not serves_choices(estimator):
            findings.append(
                f"{type(estimator).__name__} cannot learn choices such as {own}. Give them "
                f"PolicyGradient(), for example {{{own[0]!r}: PolicyGradient(), '*': …}}"
            )
        elif own and not is_policy:
            if others:
                result.append((pattern, estimator, others))
            result.append((f"{pattern} (choices)", PolicyGradient(estimator), own))
            continue
        result.append((pattern, estimator, names))
    policies = [pattern for pattern, each, _ in result if isinstance(each, PolicyGradient)]
    if len(policies) > 1:
        findings.append(
            f"The patterns {policies} each have a PolicyGradient, expected one: choices are "
            "learned together, from the same held-out losses. Give them one pattern"
        )
    return result, findings


def check_arguments(
    estimator: Any,
    optimizer: Any,
    dataloader: Any,
    derivatives: Any,
    validation_loss: Any,
    monitor: Any,
    optimizer_hyperparameters: Any,
    flags: Mapping[str, Any],
) -> None:
    """Checks the kinds of the callback's arguments.

    Raises:
        TypeError: If one is of the wrong kind.
        ValueError: If ``derivatives`` is unknown.
    """
    is_mapping = isinstance(estimator, Mapping) and len(estimator) > 0
    given = estimator.items() if is_mapping else (("*", estimator),)
    for pattern, each in () if estimator is None else given:
        if not (isinstance(each, Estimator) and isinstance(pattern, str)):
            is_class = isinstance(each, type) and issubclass(each, Estimator)
            raise TypeError(
                f"OnlineHPOCallback: {each.__name__} is a class, expected an instance of an "
                f"Estimator: {each.__name__}()"
                if is_class
                else f"OnlineHPOCallback: estimator={estimator!r}, expected an instance of an "
                "Estimator, for example ClipR(radius=20.0), or a mapping from patterns of names to "
                "such instances, for example {'keep*': T1T2(), '*': ClipR()}"
            )
    if not callable(optimizer):
        raise TypeError(
            f"OnlineHPOCallback: optimizer={optimizer!r}, expected a callable from a list of "
            "tensors to a torch.optim.Optimizer, for example optimizer=lambda raw: "
            "torch.optim.Adam(raw, lr=0.05)"
        )
    is_loader = isinstance(
        dataloader, classes("utilities.CombinedLoader")
    )  # an iterator, but one that begins anew
    if isinstance(dataloader, (Dataset, Iterator)) and not is_loader:
        raise TypeError(
            f"OnlineHPOCallback: dataloader is a {type(dataloader).__name__}, expected a "
            "DataLoader, or another iterable of batches that can be iterated again and again"
        )
    parts = dataloader.values() if isinstance(dataloader, Mapping) else dataloader
    if isinstance(dataloader, (list, tuple, Mapping)) and any(
        isinstance(part, Dataset) for part in parts
    ):
        raise TypeError(
            "OnlineHPOCallback: dataloader holds a Dataset, expected DataLoaders: "
            "DataLoader(dataset, batch_size=...)"
        )
    if monitor is not None and not isinstance(monitor, str):
        raise TypeError(
            f"OnlineHPOCallback: monitor={monitor!r} is a {type(monitor).__name__}, expected the "
            "name under which validation_step logs its loss"
        )
    if validation_loss is not None and not callable(validation_loss):
        raise TypeError(
            f"OnlineHPOCallback: validation_loss={validation_loss!r}, expected a function of the "
            "module and a batch; the name of a logged value goes to monitor="
        )
    check_flag("OnlineHPOCallback", **flags)
    check_choice("OnlineHPOCallback", DERIVATIVES, derivatives=derivatives)
    check_option_names(optimizer_hyperparameters)


def check_windows(estimators: Collection[Estimator], every_n_steps: int) -> None:
    """Checks that the windows of the estimators fit between two updates, and agree on θ.

    Raises:
        ValueError: If they do not.
    """
    for estimator in estimators:
        name = type(estimator).__name__
        if estimator.window is not None and every_n_steps < estimator.window:
            raise ValueError(
                f"OnlineHPOCallback: every_n_steps={every_n_steps} is smaller than the window of "
                f"{estimator.window} steps of {name}; make it at least as large, or shorten the "
                "window"
            )
        if estimator.restart and len(estimators) > 1:
            raise ValueError(
                f"OnlineHPOCallback: {name}(restart=True) returns θ to the start of its window, "
                f"which the other {len(estimators) - 1} estimators cannot follow; use it alone"
            )


def check_option_names(names: Any) -> None:
    """Checks the argument ``optimizer_hyperparameters`` of the callback.

    Raises:
        ValueError: If another option than ``weight_decay`` is ``"auto"``.
        TypeError: If it is neither a collection of names nor a mapping to hyperparameters.
    """
    if isinstance(names, str):
        raise TypeError(
            f"OnlineHPOCallback: optimizer_hyperparameters={names!r}, expected a list of names: "
            f"[{names!r}]"
        )
    for name, h in names.items() if isinstance(names, Mapping) else ():
        if h == "auto" and name != "weight_decay":
            raise ValueError(
                f'OnlineHPOCallback: optimizer_hyperparameters[{name!r}] is "auto", which is known '
                f"for 'weight_decay' alone; pass a Hyperparameter, or for its default a list of "
                "names"
            )
        if h is not None and h != "auto" and not isinstance(h, Hyperparameter):
            raise TypeError(
                f"OnlineHPOCallback: optimizer_hyperparameters[{name!r}] is a {type(h).__name__}, "
                f"expected a Hyperparameter, for example {{{name!r}: Hyperparameter(1e-3, "
                "Positive())}; for its default pass a list of names"
            )
