"""Small detectors and segmentors of every family on the nuclei, for the tests of training."""

import itertools
from pathlib import Path

import timm
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

import visattn.mm  # noqa: F401 - registers what the configs name

CONFIGS = Path(__file__).parents[2] / "configs"
COUNT = itertools.count()
# the smallest variant of each of the families
FAMILIES = {
    "biformer": "test_biformer",
    "maxvit": "test_maxvit_va",
    "nat": "test_dinat",
    "halonet": "test_halonet_va",
    "coatnet": "test_coatnet_va",
    "transnext": "test_transnext",
    "overlock": "test_overlock",
    "resnest": "test_resnest_va",
    "agent": "test_agent_swin",
    "efficient": "test_efficient_cswin",
    "l2vit": "test_l2vit",
    "shiftvit": "test_shiftvit",
}
WIDTH = 64  # of necks and heads


def parts(kind, channels):
    """The small head of a kind for a backbone's channels, as changes to its base file."""
    neck = {"neck": {"in_channels": channels, "out_channels": WIDTH}}
    roi = {"in_channels": WIDTH, "num_classes": 1}
    if kind == "mask_rcnn":
        heads = {
            "bbox_roi_extractor": {"out_channels": WIDTH},
            "mask_roi_extractor": {"out_channels": WIDTH},
            "bbox_head": {**roi, "fc_out_channels": 256},
            "mask_head": {**roi, "conv_out_channels": WIDTH},
        }
        few = {"nms_pre": 500, "max_per_img": 200}  # proposals, for small images
        return {
            **neck,
            "rpn_head": {"in_channels": WIDTH, "feat_channels": WIDTH},
            "roi_head": heads,
            "train_cfg": {"rpn_proposal": few, "rcnn": {"sampler": {"num": 128}}},
            "test_cfg": {"rpn": few},
        }
    if kind == "retinanet":
        return {**neck, "bbox_head": {**roi, "stacked_convs": 2, "feat_channels": WIDTH}}
    if kind == "upernet":
        head = {"in_channels": channels, "channels": WIDTH, "num_classes": 2}
        return {
            "decode_head": head,
            "auxiliary_head": {"in_channels": channels[2], "channels": WIDTH, "num_classes": 2},
        }
    return {**neck, "decode_head": {"in_channels": [WIDTH] * 4, "channels": WIDTH, "num_classes": 2}}


def small_config(kind, model_name, data, work_dir, iterations, **changes):
    """A run of `iterations` of `kind` (mask_rcnn, retinanet, upernet or semantic_fpn) with a small backbone.

    Args:
        kind: A base file's name.
        model_name: The backbone.
        data: Folder that tools/make_small_sets.py has filled.
        work_dir: Where logs and checkpoints go.
        iterations: Of two images each.
        **changes: Keys of the config, dotted keys with "__".
    """
    task = "detection" if kind in ("mask_rcnn", "retinanet") else "segmentation"
    config = Config()
    for name in (kind, "nuclei", "runtime"):
        config.merge_from_dict(Config.fromfile(CONFIGS / task / "_base_" / f"{name}.py").to_dict())
    channels = [level["num_chs"] for level in timm.create_model(model_name).feature_info[-4:]]
    config.merge_from_dict({"model": parts(kind, channels)})
    config.model.backbone = ConfigDict(type="visattn.TimmBackbone", model_name=model_name, out_norm="layer")
    if task == "segmentation":
        config.model.data_preprocessor.size = (256, 256)
    for split in ("train", "val", "test"):
        config[f"{split}_dataloader"].dataset.data_root = f"{data}/nuclei/"
    if task == "detection":
        metric = ["bbox", "segm"] if kind == "mask_rcnn" else ["bbox"]
        for evaluator in (config.val_evaluator, config.test_evaluator):
            evaluator.update(ann_file=f"{data}/nuclei/val.json", metric=metric)
    config.merge_from_dict(
        {
            "train_dataloader.batch_size": 2,
            "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": iterations, "val_interval": 10**6},
            "val_cfg": {"type": "ValLoop"},
            "test_cfg": {"type": "TestLoop"},
            "optim_wrapper": {
                "type": "OptimWrapper",
                "constructor": "BackboneOptimWrapperConstructor",
                "optimizer": {"type": "AdamW", "lr": 2e-3, "weight_decay": 0.05},
                "paramwise_cfg": {"norm_decay_mult": 0.0},
                "clip_grad": {"max_norm": 5.0},
            },
            # batch norm's running statistics catch up while the learning rate falls
            "param_scheduler": [
                {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 10},
                {"type": "CosineAnnealingLR", "T_max": iterations, "by_epoch": False, "eta_min": 1e-6},
            ],
            "default_hooks": {
                "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 10**6, "save_last": True},
                "logger": {"type": "LoggerHook", "interval": 20},
            },
            "log_processor": {"by_epoch": False},
            "log_level": "WARNING",
            "randomness": {"seed": 0},
            "work_dir": str(work_dir),
            "experiment_name": f"run{next(COUNT)}",  # mmengine keeps one visualizer per name
        }
    )
    config.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def losses(runner):
    """The loss of every iteration."""
    return list(runner.message_hub.get_scalar("train/loss").data[0])


@HOOKS.register_module()
class SameWeightsEverywhere(Hook):
    """Compares what the processes of a run have learnt, and from what."""

    def before_train(self, runner):
        self.images = set()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.images.update(sample.img_path for sample in data_batch["data_samples"])

    def after_train(self, runner):
        weights = [parameter.detach().clone() for parameter in runner.model.parameters()]
        everywhere = all_gather_object((weights, self.images))
        if not is_main_process():
            return
        for others, images in everywhere[1:]:
            assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
            assert not images & self.images
        print(f"the same weights in {len(everywhere)} processes, of other images")
