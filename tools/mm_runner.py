"""What tools/{train,test}_{det,seg}.py share: a config file and options to mmengine's Runner."""

import argparse
import atexit
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

try:
    import torch
    from mm_checks import check_data
    from mmengine.config import Config, ConfigDict, DictAction
    from mmengine.dist import broadcast_object_list, init_dist, is_main_process
    from mmengine.logging import MMLogger
    from mmengine.runner import Runner
    from mmengine.utils.dl_utils import set_multi_processing

    from visattn.mm import check_published, fit_channels
    from visattn.train import distributed
except ImportError as error:
    sys.exit(f"expected mmengine, mmcv, mmdet and mmsegmentation ({error}); try tools/install_mm.sh")
from visattn.weights import WeightsError, first_line, load_weights

# How what mmengine says at length begins: hundreds of lines on the environment, the config, the hooks, the parameters.
LONG = re.compile(r"\s*(-{60}\s+System environment|Config:|Hooks will be executed|paramwise_options)")
LOGGERS = {"tensorboard": "TensorboardVisBackend", "wandb": "WandbVisBackend"}


class QuietRunner(Runner):
    """Leaves what is long to the log file in the work folder."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(lambda record: not LONG.match(record.getMessage()))
        if is_main_process():
            print(f"config, environment, hooks and parameters: {self.log_dir}/{self.timestamp}.log", flush=True)
        return logger


def main(scope: str, job: str, description: str) -> None:
    """Parse the command line and run `job`.

    Args:
        scope: "mmdet" or "mmseg".
        job: "train" or "test".
        description: For `--help`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=Path, help="file of configs/")
    if job == "test":
        parser.add_argument("checkpoint", help="weights of the whole detector or segmentor")
        parser.add_argument("--tta", action="store_true", help="several scales and flips: the config's tta_pipeline")
        parser.add_argument("--show", action="store_true", help="write pictures of predictions into the work folder")
    else:
        parser.add_argument("--amp", choices=("bfloat16", "float16"), help="backbone and neck in this precision")
        parser.add_argument(
            "--resume", nargs="?", const="auto", metavar="FILE", help="go on from this checkpoint, or from the last one"
        )
        start = parser.add_mutually_exclusive_group()
        start.add_argument("--pretrained", action="store_true", help="start from the backbone's published weights")
        start.add_argument(
            "--weights", type=Path, metavar="FILE", help="start from these, of the backbone or of the whole model"
        )
    parser.add_argument("--work-dir", help="default: output/CONFIG")
    parser.add_argument("--log", nargs="+", default=[], choices=sorted(LOGGERS), help="report there too")
    parser.add_argument("--no-check", action="store_true", help="do not look at the data before the run")
    parser.add_argument("--seed", type=seed, help="of the weights and the order of the data")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    try:
        args = parser.parse_args()
    except ValueError as error:  # mmengine's DictAction, of an option without "="
        stop(f"expected --cfg-options KEY=VALUE, got others ({first_line(error)}); try key.of.config=value")
    config = read_config(args.config, args.cfg_options)
    if config.get("default_scope") != scope:
        stop(f"expected a config of {scope}, got one of {config.get('default_scope')}; try the other command")
    config.work_dir = args.work_dir or config.get("work_dir") or f"output/{args.config.stem}"
    if args.log:
        config.visualizer.vis_backends += [ConfigDict(type=LOGGERS[name]) for name in args.log]
    if args.seed is not None:
        config.randomness = ConfigDict(seed=args.seed)
    if job == "test":
        config.load_from = args.checkpoint
        if args.tta and "tta_pipeline" not in config:
            stop(f"expected a config with tta_pipeline, got {args.config}; try without --tta")
        if args.tta:
            config.test_dataloader.dataset.pipeline = config.tta_pipeline
            config.model = ConfigDict(config.tta_model, module=config.model)
        if args.show:
            hook = {"mmdet": "DetVisualizationHook", "mmseg": "SegVisualizationHook"}[scope]
            config.default_hooks["visualization"] = ConfigDict(type=hook, draw=True, interval=1)
    else:
        config.resume = args.resume is not None
        config.load_from = config.get("load_from") if args.resume in (None, "auto") else args.resume
        if args.amp:
            config.optim_wrapper.update(type="AutocastOptimWrapper", dtype=args.amp)
        start_from(config, args)
        log_often(config)
    start_processes(config)
    if not args.no_check:
        check(config, job)
    runner = None
    try:
        fit_channels(config.model.get("module", config.model))  # "module" is the model under --tta
        runner = QuietRunner.from_cfg(config)
        getattr(runner, job)()
    except WeightsError as error:
        stop(str(error))
    except FileNotFoundError as error:
        stop(f"expected the files that {args.config} names, got: {error}; try other paths in it")
    except (AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        if runner is not None:
            raise  # no fault of the config
        got = f"{type(error).__name__}: {first_line(error)}"
        stop(f"expected a config that can be built, got {args.config} with {got}; try one of configs/")


def read_config(path: Path, changes: dict[str, Any]) -> Config:
    """Read a config file and change it; end with one line where that fails."""
    if not path.is_file():
        stop(f"expected a config file, got {path}; try one of configs/")
    try:
        config = Config.fromfile(path)
        config.merge_from_dict(changes)
    except Exception as error:  # a config is a program
        got = f"{type(error).__name__}: {first_line(error)}"
        stop(f"expected a config that can be read, got {path} with {got}; try one of configs/")
    return config


def stop(message: str) -> NoReturn:
    """End with one line."""
    sys.exit(f"error: {message}")


def start_from(config: Config, args: argparse.Namespace) -> None:
    """Put the weights that the command line asks for into the config; stop where they cannot be had."""
    if not args.pretrained and args.weights is None:
        return
    backbone = config.get("model", {}).get("backbone", {})
    if "model_name" not in backbone:
        stop(
            f"expected a config with visattn.TimmBackbone, got {backbone.get('type')}; try its own way to load weights"
        )
    if args.weights is not None and args.resume is not None:
        stop("expected --weights or --resume, got both; try --resume alone to go on")
    try:
        if args.pretrained:
            if "pretrained_cfg_overlay" not in backbone:
                check_published(backbone.model_name)
            backbone.update(pretrained=True, checkpoint=None)
        elif any(key.startswith("backbone.") for key in load_weights(args.weights)):
            config.load_from = str(args.weights)
        else:
            backbone.update(pretrained=False, checkpoint=str(args.weights))
    except WeightsError as error:
        stop(str(error))


def log_often(config: Config) -> None:
    """Let a run of few iterations, or with few between its tests, log a loss before their end too."""
    schedule, hooks = config.get("train_cfg") or {}, config.setdefault("default_hooks", ConfigDict())
    if "max_iters" in schedule:
        hook = hooks.setdefault("logger", ConfigDict(type="LoggerHook"))
        hook.interval = min(hook.get("interval", 10), schedule.max_iters, schedule.get("val_interval", 1000))


def check(config: Config, job: str) -> None:
    """Look at the data in the first process; all end where they are not as they should be."""
    stops = [False]
    if is_main_process():
        try:
            findings, summary = check_data(config, job)
            print(summary, *findings.lines("warning"), sep="\n", flush=True)
            errors = findings.lines("error")
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # parts of a config of another type
            got = f"{config.filename} with {type(error).__name__}: {first_line(error)}"
            errors = [f"error: expected a config whose data can be read, got {got}; try one of configs/, or --no-check"]
        for line in errors:
            print(line, file=sys.stderr, flush=True)
            stops = [True]
    broadcast_object_list(stops)
    if stops[0]:
        sys.exit(1)


def seed(text: str) -> int:
    """What all generators take; argparse says the rest."""
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"expected 0 to {2**32 - 1}, got {text[:80]}; try 42")
    return value


def start_processes(config: Config) -> None:
    """Under torchrun, join the other processes; without a GPU too, which mmengine's launcher needs."""
    if "LOCAL_RANK" not in os.environ:
        return
    config.launcher = "pytorch"
    atexit.register(distributed.stop)
    if torch.cuda.is_available():
        environment = config.get("env_cfg", {})
        set_multi_processing(**environment.get("mp_cfg", {}), distributed=True)
        init_dist(config.launcher, **environment.get("dist_cfg", {}))
        return
    torch.distributed.init_process_group("gloo")
    config.model = without_sync_bn(config.model)
    config.sync_bn = None
    unused = config.get("find_unused_parameters", False)
    config.model_wrapper_cfg = ConfigDict(
        type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False, find_unused_parameters=unused
    )


def without_sync_bn(value: Any) -> Any:
    """A part of a config with batch norms of each process, as PyTorch has no others on CPUs."""
    if isinstance(value, dict):
        return ConfigDict({key: without_sync_bn(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(without_sync_bn(item) for item in value)
    return "BN" if value == "SyncBN" else value
