"""The model, its task (timm.task), optimizer and scheduler, as the options ask for."""

import difflib
import fnmatch
from typing import Any

import timm
import torch
import yaml
from rich.console import Console
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import unwrap_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from train.config import Config
from train.distributed import World
from train.errors import ConfigError
from train.metrics import say
from train.weights import load_into

DISTILLATION = {"logit": LogitDistillationTask, "feature": FeatureDistillationTask, "token": TokenDistillationTask}


def check_names(config: Config) -> None:
    """Raise ConfigError for a model or an optimizer that nobody registered, with the nearest names."""
    for option, name in (("--model", config.model), ("--kd-model", config.kd_model)):
        if name is not None and not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.3)
            raise ConfigError(f"{option}: expected a registered model, got {name!r}; try {', '.join(near)}")
    if config.opt not in list_optimizers():
        near = difflib.get_close_matches(config.opt, list_optimizers(), n=3, cutoff=0.0)
        raise ConfigError(f"--opt: expected a timm optimizer, got {config.opt!r}; try {', '.join(near)}")


def make_model(config: Config, num_classes: int, console: Console) -> nn.Module:
    """Create the model for the resolved input; models of a fixed size are built for that size."""
    input_args = {"in_chans": config.in_chans, "img_size": config.img_size}
    arguments = resolve_model_input_args(config.model, input_args, num_classes=num_classes)
    if config.drop_path is not None:  # only if asked for: not every timm model takes it
        arguments["drop_path_rate"] = config.drop_path
    for argument in config.model_args:
        name, _, value = argument.partition("=")
        arguments[name] = yaml.safe_load(value)
    try:
        model = timm.create_model(**arguments, pretrained=config.pretrained)
    except TypeError as error:
        raise ConfigError(
            f"expected options that {config.model} takes, got: {error}; try without --drop-path or --model-args"
        ) from error
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise
        raise ConfigError(
            f"--pretrained: expected weights of {config.model}, got: {error}; try --weights FILE"
        ) from error
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": config.mean, "std": config.std}  # what distillation reads
    if config.weights and (left_out := load_into(model, config.weights)):
        say(console, f"{config.weights}: left out {', '.join(left_out)}, whose sizes differ")
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if config.train_only:
        names = [name for name, _ in model.named_parameters()]
        kept = {name for pattern in config.train_only for name in fnmatch.filter(names, pattern)}
        if not kept:
            raise ConfigError(
                f"--train-only: expected patterns that match parameters of {config.model}, got "
                f"{', '.join(config.train_only)}; try the ends of {', '.join(names[-2:])}"
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in kept)
    return model


def make_task(config: Config, model: nn.Module, device: torch.device) -> TrainingTask:
    """The training task: labels alone, or labels and a teacher."""
    loss = {"smoothing": config.smoothing, "soft_targets": bool(config.mixup or config.cutmix)}
    if config.kd_model is None:
        return ClassificationTask(model, criterion_kwargs=loss, device=device)
    arguments: dict[str, Any] = {"num_classes": model.num_classes, "in_chans": config.in_chans}
    try:
        teacher = timm.create_model(config.kd_model, pretrained=config.kd_weights is None, **arguments)
        if config.kd_weights is not None:
            load_into(teacher, config.kd_weights)
            teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": config.mean, "std": config.std}
        options = {} if config.kd_type == "feature" else {"temperature": config.kd_temperature}
        return DISTILLATION[config.kd_type](
            model,
            DistillationTeacher(teacher.requires_grad_(False).to(device), device=device),
            criterion_kwargs=loss,
            distill_loss_weight=config.kd_weight,
            device=device,
            **options,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--kd-model: expected a teacher for {config.model}, got: {error}; try --kd-weights"
        ) from error


def make_optimizer(config: Config, task: TrainingTask) -> torch.optim.Optimizer:
    """timm's optimizer with weight decay where it belongs, and layer decay."""
    return create_optimizer_v2(
        unwrap_model(task.get_trainable_module()),
        opt=config.opt,
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
    )


def make_scheduler(config: Config, optimizer: torch.optim.Optimizer, updates: int) -> Scheduler:
    """The schedule, with `updates` in an epoch."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="poly" if config.sched == "linear" else config.sched,
        num_epochs=config.epochs,
        decay_rate=1.0,  # the power of poly
        cooldown_epochs=config.cooldown_epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return scheduler


def export_state(task: TrainingTask, world: World, ema: bool = False) -> dict[str, torch.Tensor]:
    """The full state dict of the model that is evaluated; with fsdp2 all processes must ask for it together."""
    options = StateDictOptions(full_state_dict=world.size > 1, cpu_offload=world.size > 1)
    return get_model_state_dict(unwrap_model(task.get_eval_model(ema=ema)), options=options)
