"""Configs of detectors and segmentors are short, build, fit their backbones and say what the official code says."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import timm
import torch
from mmdet.registry import MODELS as DET_MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS as SEG_MODELS

from visattn.mm import TimmBackbone, fit_channels

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FOLDERS = ("detection", "segmentation")
LEAVES = sorted(str(path.relative_to(CONFIGS)) for folder in FOLDERS for path in (CONFIGS / folder).glob("[!o]*.py"))
# One leaf of every kind and family is built in every run, all others in the slow one.
BUILT = [
    "detection/cascade_mask_rcnn_agent-swin-tiny_fpn_1x_coco.py",
    "detection/cascade_mask_rcnn_dinat-s-tiny_fpn_3x_coco.py",
    "detection/cascade_mask_rcnn_resnest50-va_fpn_1x_coco.py",
    "detection/dino_4scale_transnext-tiny_12e_coco.py",
    "detection/dino_5scale_transnext-tiny_12e_coco.py",
    "detection/mask2former_dinat-large_100e_coco-panoptic.py",
    "detection/mask_rcnn_nat-mini_fpn_3x_coco.py",
    "detection/mask_rcnn_overlock-t_fpn_1x_coco.py",
    "detection/mask_rcnn_resnet50-ea_ea-fpn_1x_coco.py",
    "detection/mask_rcnn_transnext-tiny_fpn_1x_coco.py",
    "detection/retinanet_agent-pvt-tiny_fpn_1x_coco.py",
    "detection/retinanet_biformer-small_fpn_1x_coco.py",
    "detection/retinanet_l2vit-tiny_fpn_1x_coco.py",
    "segmentation/deeplabv3plus_resnest101-va_160k_ade20k.py",
    "segmentation/mask2former_dinat-large_90k_cityscapes.py",
    "segmentation/mask2former_transnext-tiny_160k_ade20k.py",
    "segmentation/semantic_fpn_biformer-small_80k_ade20k.py",
    "segmentation/upernet_agent-swin-tiny_160k_ade20k.py",
    "segmentation/upernet_dinat-mini_160k_ade20k.py",
    "segmentation/upernet_l2vit-tiny_160k_ade20k.py",
    "segmentation/upernet_overlock-t_160k_ade20k.py",
]
every_leaf = pytest.mark.parametrize("leaf", LEAVES)
every_built = pytest.mark.parametrize(
    "leaf", [pytest.param(leaf, marks=() if leaf in BUILT else pytest.mark.slow) for leaf in LEAVES]
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def read(leaf):
    return Config.fromfile(CONFIGS / leaf)


def build(leaf):
    """A leaf's config and its model, without memory."""
    config = read(leaf)
    init_default_scope(config.default_scope)
    with torch.device("meta"):
        return config, (DET_MODELS if leaf.startswith("detection") else SEG_MODELS).build(config.model)


def groups(leaf):
    """{parameter: (learning rate, weight decay)}, both as parts of the optimizer's own."""
    config, model = build(leaf)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    lr, decay = config.optim_wrapper.optimizer.lr, config.optim_wrapper.optimizer.weight_decay
    return {
        names[id(parameter)]: (group["lr"] / lr, group["weight_decay"] / decay)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


NECKS = {"fpn": "FPN", "ea-fpn": "EfficientAttentionFPN"}
FOLDS = {"coco": "data/coco/", "ade20k": "data/ade/ADEChallengeData2016", "cityscapes": "data/cityscapes/"}


@every_leaf
def test_a_leaf_is_short_and_what_its_name_says(leaf):
    """{head}_{model}[_{neck}]_{schedule}_{data}: see visattn/mm/README.md."""
    text, stem, config = (CONFIGS / leaf).read_text(), Path(leaf).stem, read(leaf)
    bases = re.findall(r'"(.*?)"', re.search(r"^_base_ = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[1])
    assert len(text.splitlines()) <= 25
    assert "pretrained" not in text
    assert all(base.startswith("_base_/") for base in bases)
    head, model = Path(bases[0]).stem.removesuffix("_panoptic"), config.model.backbone.model_name
    model = re.sub("_21k.*", "", model).replace("_", "-")  # weights of ImageNet-22k go without saying
    assert stem.startswith(f"{head}_{model}_")
    *neck, schedule, data = stem.removeprefix(f"{head}_{model}_").split("_")
    assert not neck or config.model.neck.type == NECKS[neck[0]]
    number, unit = int(schedule[:-1]), schedule[-1]
    end = config.train_cfg.get("max_epochs") or config.train_cfg.max_iters
    epoch = 1 if "max_epochs" in config.train_cfg else 7375  # batches of 16 in COCO
    assert end == number * {"x": 12, "e": epoch, "k": 1000}[unit]
    data, _, task = data.partition("-")
    assert config.train_dataloader.dataset.data_root == FOLDS[data]
    instance = "instance" if (head, data) == ("mask2former", "coco") else ""
    assert task == ("panoptic" if "panoptic" in bases[0] else instance)
    numbers = r"[Oo]fficial numbers(?:, not reproduced here| are not known): (model_cards/\w+\.md)\."
    card = re.search(numbers, text.replace("\n# ", " "))[1]
    assert f"{Path(leaf).name})" in (ROOT / card).read_text()


@every_built
def test_channels_are_the_backbones(leaf):
    config, fitted = read(leaf), read(leaf)
    fit_channels(fitted.model)
    assert fitted.model.to_dict() == config.model.to_dict()


@every_leaf
def test_no_norm_is_made_for_a_level_that_the_neck_leaves_out(leaf):
    """Its parameters would have no gradient: DistributedDataParallel stops."""
    config = read(leaf)
    assert config.model.backbone.get("out_norm") is None or not config.model.get("neck", {}).get("start_level")


@every_leaf
def test_the_images_are_those_of_the_backbone(leaf):
    config = read(leaf)
    weights = timm.get_pretrained_cfg(config.model.backbone.model_name)
    assert config.model.data_preprocessor.mean == pytest.approx([255 * v for v in weights.mean], rel=5e-3)
    assert config.model.data_preprocessor.std == pytest.approx([255 * v for v in weights.std], rel=1e-3)
    assert config.custom_hooks == [{"type": "PlainCheckpointHook"}]
    assert config.sync_bn == "torch"


@every_built
def test_the_model_builds_and_fits_its_backbone(leaf):
    config, model = build(leaf)
    channels = model.backbone.out_channels
    if "in_channels" in config.model.get("neck", {}):
        assert config.model.neck.in_channels == channels
    elif "panoptic_head" in config.model:
        assert config.model.panoptic_head.in_channels == channels
    else:
        head = config.model.decode_head
        expected = [channels[i] for i in head.in_index] if isinstance(head.get("in_index"), list) else channels
        assert head.in_channels == (channels[head.in_index] if isinstance(head.get("in_index"), int) else expected)
        assert "c1_in_channels" not in head or head.c1_in_channels == channels[0]
    if "auxiliary_head" in config.model:
        assert config.model.auxiliary_head.in_channels == channels[config.model.auxiliary_head.in_index]


@pytest.mark.parametrize(
    ("leaf", "millions"),
    [
        ("detection/mask_rcnn_transnext-tiny_fpn_1x_coco.py", 47.9),
        pytest.param("detection/mask_rcnn_transnext-small_fpn_1x_coco.py", 69.3, marks=pytest.mark.slow),
        pytest.param("detection/mask_rcnn_transnext-base_fpn_1x_coco.py", 109.2, marks=pytest.mark.slow),
    ],
)
def test_detectors_have_the_published_number_of_parameters(leaf, millions):
    assert sum(p.numel() for p in build(leaf)[1].parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


NORMS = ["*norm*"]
AGENTS = [f"*.{axes}_bias" for axes in ("an", "na", "ah", "aw", "ha", "wa")]
POSITIONS = ["*.query_embedding", "*.local_bias", "*.cpb_fc*", "*.temperature"]


@pytest.mark.parametrize(
    ("leaf", "patterns"),
    [
        ("detection/mask_rcnn_nat-mini_fpn_3x_coco.py", [*NORMS, "*.rpb"]),
        ("segmentation/upernet_dinat-mini_160k_ade20k.py", [*NORMS, "*.rpb"]),
        ("detection/mask_rcnn_transnext-tiny_fpn_1x_coco.py", [*NORMS, *POSITIONS]),
        ("segmentation/upernet_agent-swin-tiny_160k_ade20k.py", [*NORMS, *AGENTS, "*.rpb"]),
        ("detection/mask_rcnn_biformer-small_fpn_1x_coco.py", NORMS),
        ("detection/retinanet_biformer-small_fpn_1x_coco.py", []),
        ("detection/retinanet_agent-pvt-tiny_fpn_1x_coco.py", []),
        ("detection/retinanet_l2vit-tiny_fpn_1x_coco.py", []),
        ("segmentation/upernet_l2vit-tiny_160k_ade20k.py", []),
        ("segmentation/deeplabv3plus_resnest101-va_160k_ade20k.py", []),
    ],
)
def test_what_does_not_decay_is_what_the_official_patterns_name(leaf, patterns):
    """They match names, so that heads' batch norms (`bn`) and biases decay."""
    found = groups(leaf)
    still = {name for name, (_, decay) in found.items() if decay == 0}
    assert still == {name for name in found if any(fnmatch(name, pattern) for pattern in patterns)}
    assert all(any(fnmatch(name, pattern) for name in found) for pattern in patterns)
    assert {lr for lr, _ in found.values()} == {1.0}


@pytest.mark.parametrize(
    ("leaf", "still"),
    [
        ("detection/dino_4scale_transnext-tiny_12e_coco.py", []),
        ("segmentation/mask2former_transnext-tiny_160k_ade20k.py", ["query_embed", "query_feat", "level_embed"]),
    ],
)
def test_transnext_in_transformers_has_a_tenth_of_the_rate(leaf, still):
    """Nothing of one dimension decays, nor do norms, biases and positions, nor embeddings of Mask2Former's."""
    found, (_, model) = groups(leaf), build(leaf)
    flat = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    embeddings = {f"decode_head.{name}.weight" for name in still}
    positions = {name for name in found if any(fnmatch(name, pattern) for pattern in POSITIONS)}
    # mmengine reads the packed biases of attention as flat; nothing else is named bias
    assert {name for name, (_, decay) in found.items() if decay == 0} == flat | embeddings | positions
    assert {name for name, (lr, _) in found.items() if lr < 1} == {n for n in found if n.startswith("backbone.")}
    assert {round(lr, 9) for lr, _ in found.values()} == {0.1, 1.0}


@pytest.mark.parametrize(
    "leaf",
    ["segmentation/mask2former_dinat-large_90k_cityscapes.py",
     "detection/mask2former_dinat-large_100e_coco-panoptic.py"],
)  # fmt: skip
def test_nat_in_mask2former_has_a_tenth_of_the_rate(leaf):
    found = groups(leaf)
    for name, (lr, decay) in found.items():
        inside = name.startswith("backbone.")
        assert lr == pytest.approx(0.1 if inside else 1.0)
        if inside:
            assert decay == (0 if "norm" in name or name.endswith(".rpb") else 1), name
        elif re.search(r"head\.(query_embed|query_feat|level_embed)\.", name):
            assert decay == 0, name
    assert any(decay == 0 for name, (_, decay) in found.items() if ".norms." in name and "head" in name)


def settings(leaf):
    """What the tables of official configs list of a leaf."""
    config = read(leaf)
    optimizer, backbone = config.optim_wrapper.optimizer, config.model.backbone
    found = {"lr": optimizer.lr, "decay": optimizer.weight_decay, "batch": config.train_dataloader.batch_size}
    found |= {"end": config.param_scheduler[-1].end, "warmup": config.param_scheduler[0].end}
    found |= {key: backbone[key] for key in backbone if key not in ("type", "model_name", "pretrained")}
    return found


BIFORMER = {"out_norm": "layer", "norm_eval": True, "n_win": "detection", "batch": 2, "end": 12, "warmup": 500}
L2VIT = {"out_norm": "layer"}
NAT = {"out_norm": "layer", "batch": 2, "end": 36, "warmup": 500}
SEG = {"batch": 2, "end": 160000, "warmup": 1500, "lr": 6e-5}
TRANSNEXT = {"out_norm": "own", "position_bias": "interpolate", "bias_img_size": 800, "lr": 1e-4, "decay": 0.05}


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        ("detection/mask_rcnn_biformer-base_fpn_1x_coco.py",
         {**BIFORMER, "lr": 1e-4, "decay": 0.05, "drop_path_rate": 0.3}),
        ("detection/retinanet_biformer-small_fpn_1x_coco.py",
         {**BIFORMER, "lr": 1e-4, "decay": 1e-4, "drop_path_rate": 0.2, "out_indices": [1, 2, 3]}),
        ("segmentation/semantic_fpn_biformer-small_80k_ade20k.py",
         {"out_norm": "layer", "n_win": "segmentation", "batch": 4, "end": 80000, "warmup": 1000, "lr": 2e-4,
          "decay": 1e-4, "drop_path_rate": 0.15}),
        ("segmentation/upernet_biformer-base_160k_ade20k.py",
         {**SEG, "out_norm": "layer", "n_win": "segmentation", "decay": 0.01, "drop_path_rate": 0.4}),
        ("detection/mask_rcnn_dinat-small_fpn_3x_coco.py",
         {**NAT, "lr": 1e-4, "decay": 0.05, "drop_path_rate": 0.35, "dilations": "detection"}),
        ("detection/cascade_mask_rcnn_nat-tiny_fpn_3x_coco.py",
         {**NAT, "lr": 1e-4, "decay": 0.05, "drop_path_rate": 0.3}),
        ("detection/cascade_mask_rcnn_dinat-base_fpn_3x_coco.py",
         {**NAT, "lr": 7.5e-5, "decay": 0.05, "drop_path_rate": 0.6, "dilations": "detection"}),
        ("detection/cascade_mask_rcnn_dinat-s-large_fpn_3x_coco.py",
         {**NAT, "lr": 5e-5, "decay": 0.05, "drop_path_rate": 0.6, "dilations": "detection"}),
        ("segmentation/upernet_dinat-large_160k_ade20k.py",
         {**SEG, "out_norm": "layer", "decay": 0.01, "drop_path_rate": 0.3, "dilations": "segmentation_640"}),
        ("detection/mask_rcnn_l2vit-small_fpn_1x_coco.py",
         {**L2VIT, "lr": 1e-4, "decay": 0.05, "batch": 2, "end": 12, "warmup": 500, "drop_path_rate": 0.1}),
        ("detection/retinanet_l2vit-base_fpn_3x_coco.py",
         {**L2VIT, "lr": 1e-4, "decay": 0.05, "batch": 2, "end": 36, "warmup": 500, "drop_path_rate": 0.3,
          "out_indices": [1, 2, 3]}),
        ("segmentation/upernet_l2vit-base_160k_ade20k.py", {**L2VIT, **SEG, "decay": 0.01, "drop_path_rate": 0.3}),
        ("detection/mask_rcnn_overlock-s_fpn_1x_coco.py",
         {"out_norm": "detection", "lr": 2e-4, "decay": 0.05, "batch": 2, "end": 12, "warmup": 500,
          "drop_path_rate": 0.4}),
        ("detection/mask_rcnn_overlock-b_fpn_3x_coco.py",
         {"out_norm": "detection", "lr": 1e-4, "decay": 0.05, "batch": 2, "end": 36, "warmup": 500,
          "drop_path_rate": 0.6}),
        ("segmentation/upernet_overlock-b_160k_ade20k.py",
         {**SEG, "out_norm": "segmentation", "decay": 0.01, "drop_path_rate": 0.5}),
        ("detection/mask_rcnn_transnext-small_fpn_1x_coco.py",
         {**TRANSNEXT, "batch": 2, "end": 12, "warmup": 500, "drop_path_rate": 0.6}),
        ("detection/dino_4scale_transnext-tiny_12e_coco.py",
         {**TRANSNEXT, "batch": 1, "end": 12, "warmup": 12, "drop_path_rate": 0.3, "out_indices": [1, 2, 3]}),
        ("segmentation/upernet_transnext-base_160k_ade20k.py",
         {**TRANSNEXT, **SEG, "bias_img_size": 512, "drop_path_rate": 0.7}),
        ("segmentation/mask2former_transnext-base_160k_ade20k.py",
         {**TRANSNEXT, "bias_img_size": 512, "batch": 2, "end": 160000, "warmup": 160000, "drop_path_rate": 0.6}),
    ],
)  # fmt: skip
def test_settings_are_the_official_ones(leaf, expected):
    assert settings(leaf) == expected


def test_agents_have_the_published_grids_and_the_detectors_windows():
    for name, grids in (("agent-swin-tiny", [9, 12, 14, 7]), ("agent-pvt-tiny", [12, 16, 28, 28])):
        config, model = build(f"detection/mask_rcnn_{name}_fpn_1x_coco.py")
        trained = timm.create_model(config.model.backbone.model_name, device="meta")
        for stage, grid, official in zip(model.backbone.model.stages, grids, trained.stages, strict=True):
            agent = getattr(stage.blocks[0].attn, "num_agents", None)
            assert agent == getattr(official.blocks[0].attn, "num_agents", None)
            assert agent is None or stage.blocks[0].attn.agent_size == [grid, grid]
    swin = read("detection/mask_rcnn_agent-swin-tiny_fpn_1x_coco.py")
    assert swin.model.backbone.always_shift
    assert swin.model.backbone.out_norm == "layer"
    assert swin.train_dataloader.dataset.pipeline[3].type == "RandomChoice"  # many sizes, in the short schedule too


def test_l2vit_is_trained_at_many_sizes_and_never_clipped():
    """In both schedules and of both heads, with and without masks; RetinaNet from three levels."""
    leaves = [leaf for leaf in LEAVES if "_l2vit-" in leaf and leaf.startswith("detection")]
    assert len(leaves) == 12
    for leaf in leaves:
        config = read(leaf)
        masks = leaf.startswith("detection/mask")
        loading, _, choice = config.train_dataloader.dataset.pipeline[1:4]
        assert (choice.type, loading.get("with_mask", False)) == ("RandomChoice", masks)
        assert choice == read("detection/mask_rcnn_agent-swin-tiny_fpn_3x_coco.py").train_pipeline[3]
        assert ("segm" in config.val_evaluator.metric, config.optim_wrapper.get("clip_grad")) == (masks, None)
    neck = build("detection/retinanet_l2vit-tiny_fpn_1x_coco.py")[1].neck
    assert (neck.start_level, neck.num_ins) == (0, 3)


def test_the_rest_of_the_transformers_and_of_tests_is_official():
    dino = read("detection/dino_5scale_transnext-base_12e_coco.py")
    assert (dino.optim_wrapper.clip_grad.max_norm, dino.optim_wrapper.accumulative_counts) == (0.1, 2)
    assert dino.param_scheduler[0].milestones == [11]
    former = read("segmentation/mask2former_transnext-tiny_160k_ade20k.py")
    assert (former.optim_wrapper.clip_grad.max_norm, former.param_scheduler[0].power) == (0.01, 0.9)
    upernet = read("segmentation/upernet_transnext-tiny_160k_ade20k.py").model.test_cfg
    assert (upernet.mode, upernet.crop_size, upernet.stride) == ("slide", [512, 512], [341, 341])
    assert read("segmentation/upernet_dinat-tiny_160k_ade20k.py").model.test_cfg.mode == "whole"


@pytest.mark.parametrize(("model", "scope"), [("mask_rcnn", "mmdet"), ("upernet", "mmseg")])
@pytest.mark.parametrize("name", ["visattn.TimmBackbone", "TimmBackboneVA"])
def test_both_packages_find_the_backbone_under_its_name_and_the_old_one(model, scope, name):
    registry = DET_MODELS if scope == "mmdet" else SEG_MODELS
    config = Config.fromfile(CONFIGS / ("detection" if scope == "mmdet" else "segmentation") / "_base_" / f"{model}.py")
    config.model.backbone = {"type": name, "model_name": "test_dinat", "out_norm": "layer"}
    fit_channels(config.model)
    init_default_scope(scope)
    assert type(registry.build(config.model).backbone) is TimmBackbone
