"""The model, its task (timm.task), optimizer and scheduler, as the options ask for."""

import difflib
import fnmatch
import tempfile
from pathlib import Path
from typing import Any, cast

import timm
import torch
from rich.console import Console
from timm.data.loader import adapt_to_chs
from timm.models import resolve_model_input_args
from timm.models._hub import save_config_for_hf
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from visattn.published import is_known
from visattn.train.config import Config, Resolved
from visattn.train.distributed import World
from visattn.train.errors import ConfigError, TrainError, shown
from visattn.train.loader import Batches
from visattn.train.metrics import say
from visattn.train.recipes import load_yaml
from visattn.train.weights import TimmModel, load_into
from visattn.weights import WeightsError, first_line

# What models and optimizers raise when options, or the machine, do not fit them.
UNFIT = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
UNFIT += (TypeError, ValueError)
LARGEST_ARGUMENT = 100_000  # of a model: rotary embeddings count to 10,000
DISTILLATION = {"logit": LogitDistillationTask, "feature": FeatureDistillationTask, "token": TokenDistillationTask}


def check_names(config: Config) -> None:
    """Raise ConfigError for a model or an optimizer that nobody registered, with the nearest names."""
    for option, name in (("--model", config.model), ("--kd-model", config.kd_model)):
        if name is not None and not is_known(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.3) or ["test_vit"]
            hint = "a name, and --weights output/RUN/model.safetensors" if "/" in name else ", ".join(near)
            raise ConfigError(f"{option}: expected a registered model, got {shown(name)}; try {hint}")
    if config.opt not in list_optimizers():
        near = difflib.get_close_matches(config.opt, map(str, list_optimizers()), n=3, cutoff=0.0)
        raise ConfigError(f"--opt: expected a timm optimizer, got {shown(config.opt)}; try {', '.join(near)}")
    if get_optimizer_info(config.opt).second_order:
        raise ConfigError(f"--opt: expected an optimizer of first order, got {shown(config.opt)}; try adamw")


def make_model(config: Config, num_classes: int, console: Console) -> TimmModel:
    """Create the model for the resolved input; models of a fixed size are built for that size."""
    input_args = {"in_chans": config.in_chans, "img_size": config.img_size}
    arguments = resolve_model_input_args(config.model, input_args, num_classes=num_classes)
    if config.drop_path is not None:  # only if asked for: not every timm model takes it
        arguments["drop_path_rate"] = config.drop_path
    for argument in config.model_args:
        name, _, value = argument.partition("=")
        try:
            arguments[name] = load_yaml(value)
            _check_numbers(arguments[name])
        except ValueError as error:
            raise ConfigError(
                f"--model-args: expected a YAML value, got {shown(argument)} ({error}); try {name}=7 or {name}=[1, 2]"
            ) from error
    try:
        model: Any = timm.create_model(**arguments, pretrained=config.pretrained)
    except WeightsError as error:
        raise ConfigError(f"--pretrained: {error}, or --weights FILE") from error
    except UNFIT as error:
        if config.pretrained and isinstance(error, (OSError, RuntimeError)):
            raise ConfigError(
                f"--pretrained: expected weights of {config.model}, got: {first_line(error)}; try --weights FILE"
            ) from error
        raise ConfigError(
            f"expected options that {config.model} takes, got: {first_line(error)}; try without --drop-path, "
            "--model-args or --img-size"
        ) from error
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": config.mean, "std": config.std}  # what distillation reads
    if config.weights and (left_out := load_into(model, config.weights)):
        say(console, f"{config.weights}: left out {', '.join(left_out)}, whose sizes differ")
    if config.aux_loss:
        try:
            model.set_aux_training()
        except (AttributeError, ValueError) as error:
            remedy = "--model-args aux_head=true" if isinstance(error, ValueError) else "overlock_xt"
            raise ConfigError(
                f"--aux-loss: expected a model with an auxiliary classifier, got {config.model}; try {remedy}, or 0"
            ) from error
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ConfigError(
                f"--grad-checkpointing: expected a model that can, got {config.model}; try a smaller --micro-batch"
            ) from error
    if config.train_only:
        names = [name for name, _ in model.named_parameters()]
        kept = {name for pattern in config.train_only for name in fnmatch.filter(names, pattern)}
        if not kept:
            raise ConfigError(
                f"--train-only: expected patterns that match parameters of {config.model}, got "
                f"{shown(config.train_only)}; try the ends of {', '.join(names[-2:])}"
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in kept)
    return model


def _check_numbers(value: Any) -> None:
    """Raise ValueError for a number that no model can be built with in finite time."""
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item)
    elif isinstance(value, (int, float)) and not abs(value) <= LARGEST_ARGUMENT:
        raise ValueError(f"numbers up to {LARGEST_ARGUMENT} are possible")


def try_forward(model: TimmModel, config: Resolved, device: torch.device, option: str, name: str) -> None:
    """Raise ConfigError if images of the size that the run uses do not fit the model."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, config.in_chans, config.img_size, config.img_size, device=device))
    except torch.OutOfMemoryError:
        raise
    except UNFIT as error:
        size = model.pretrained_cfg["input_size"][-1]
        raise ConfigError(
            f"{option}: expected images that fit {name}, got {config.img_size}x{config.img_size} "
            f"({first_line(error)}); try --img-size {size}"
        ) from error


def frozen_modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The largest modules of which no parameter is trained."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and not any(trained):
        return [module]
    return [found for child in module.children() for found in frozen_modules(child)]


def try_training(model: nn.Module, config: Resolved, batches: Batches, world: World) -> None:
    """Raise ConfigError if a forward pass has one image, which is too few for some models' batch norm."""
    images = config.batch_size // world.size // batches.parts
    if images > 1 or (config.sync_bn and world.size > 1):
        return
    sample = torch.zeros(1, config.in_chans, config.img_size, config.img_size, device=world.device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # running statistics stay as they are
    model.train()
    for module in frozen_modules(model):
        module.eval()
    try:
        with torch.no_grad():
            torch.func.functional_call(model, buffers, sample)
    except ValueError as error:
        share = config.batch_size // world.size
        raise ConfigError(
            f"--batch-size: expected at least 2 images in a forward pass of {config.model} in training, got 1: "
            f"{share} for this process in {batches.parts} equal passes ({first_line(error)}); "
            f"try --batch-size {(share + 1) // 2 * 2 * world.size} and an even --micro-batch"
        ) from error


class AuxLoss(nn.Module):
    """The loss of the logits, and `weight` times that of an auxiliary classifier's, where a model gives both."""

    def __init__(self, criterion: nn.Module, weight: float) -> None:
        super().__init__()
        self.criterion, self.weight = criterion, weight

    def forward(self, outputs: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        logits, auxiliary = outputs
        return self.criterion(logits, target) + self.weight * self.criterion(auxiliary, target)


def make_task(config: Resolved, model: TimmModel, device: torch.device) -> TrainingTask:
    """The training task: labels alone, or labels and a teacher."""
    try_forward(model, config, device, "--img-size", config.model)
    loss = {"smoothing": config.smoothing, "soft_targets": bool(config.mixup or config.cutmix)}
    if config.kd_model is None:
        task = ClassificationTask(model, criterion_kwargs=loss, device=device)
        if config.aux_loss:
            task.criterion = AuxLoss(cast(nn.Module, task.criterion), config.aux_loss)
        return task
    try:
        teacher = make_teacher(config, config.kd_model, model.num_classes).to(device)
        try_forward(teacher, config, device, "--kd-model", config.kd_model)
        options: dict[str, Any] = {} if config.kd_type == "feature" else {"temperature": config.kd_temperature}
        return DISTILLATION[config.kd_type](
            model,
            DistillationTeacher(teacher.requires_grad_(False), device=device),
            criterion_kwargs=loss,
            distill_loss_weight=config.kd_weight,
            device=device,
            **options,
        )
    except TrainError:
        raise
    except WeightsError as error:
        raise ConfigError(f"--kd-model: {error}, or --kd-weights FILE") from error
    except UNFIT as error:
        raise ConfigError(
            f"--kd-model: expected a teacher for {config.model}, got: {first_line(error)}; try --kd-weights"
        ) from error


def make_teacher(config: Resolved, name: str, num_classes: int) -> TimmModel:
    """The trained teacher, for images of the student's size."""
    input_args = {"in_chans": config.in_chans, "img_size": config.img_size}
    arguments = resolve_model_input_args(name, input_args, num_classes=num_classes)
    teacher: Any = timm.create_model(**arguments, pretrained=config.kd_weights is None)
    if config.kd_weights is None:
        untrained = teacher.pretrained_cfg["num_classes"] != num_classes
        statistics = {key: adapt_to_chs(teacher.pretrained_cfg[key], config.in_chans) for key in ("mean", "std")}
    else:
        untrained = load_into(teacher, config.kd_weights)
        statistics = {"mean": config.mean, "std": config.std}
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, **statistics}
    if untrained and config.kd_type != "feature":
        raise ConfigError(
            f"--kd-model: expected a teacher of the {num_classes} classes, got {name} with a head for "
            "others; try --kd-weights FILE, or --kd-type feature"
        )
    return teacher


def make_optimizer(config: Config, task: TrainingTask) -> torch.optim.Optimizer:
    """timm's optimizer with weight decay where it belongs, and layer decay."""
    try:
        return create_optimizer_v2(
            unwrap_model(task.get_trainable_module()),
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
    except UNFIT as error:
        raise ConfigError(
            f"--opt: expected one that runs here, got {config.opt}: {first_line(error)}; try adamw"
        ) from error


def warmup(config: Config) -> float:
    """Epochs of warm-up: as asked for, or half of a run that would be over before."""
    return config.warmup_epochs if config.warmup_epochs < config.epochs else config.epochs / 2


def make_scheduler(config: Config, optimizer: torch.optim.Optimizer, updates: int) -> Scheduler:
    """The schedule, with `updates` in an epoch."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="poly" if config.sched == "linear" else config.sched,
        num_epochs=config.epochs,
        decay_rate=1.0,  # the power of poly
        cooldown_epochs=config.cooldown_epochs,
        # pyrefly: ignore[bad-argument-type]: timm takes parts of an epoch too
        warmup_epochs=warmup(config),
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return scheduler


def describe_model(model: TimmModel, config: Resolved, class_names: list[str]) -> bytes:
    """The config.json with which `timm.create_model("local-dir:RUN")` builds the model: arguments, input, labels."""
    names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    given = {name: getattr(config, name) for name in names}
    given["input_size"] = config.in_chans, config.img_size, config.img_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        own: dict[str, Any] = {"license": None, "tag": None}  # not those of the authors' weights
        own = {"label_names": class_names, "pretrained_cfg": own}
        save_config_for_hf(model, str(path), model_config=own, data_config=given)
        return path.read_bytes()


def export_state(task: TrainingTask, world: World, ema: bool = False) -> dict[str, Any]:
    """The full state dict of the model that is evaluated; with fsdp2 all processes must ask for it together."""
    options = StateDictOptions(full_state_dict=world.size > 1, cpu_offload=world.size > 1)
    return get_model_state_dict(unwrap_model(task.get_eval_model(ema=ema)), options=options)


def import_state(task: TrainingTask, weights: dict[str, Any]) -> None:
    """Put what `export_state` gave back into the model; with fsdp2 all processes must do so together."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(unwrap_model(task.get_eval_model()), weights, options=options)
