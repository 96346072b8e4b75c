"""transformers: its wrappers of timm's models, the detectors and segmenters that take a backbone, its Trainer."""

import json

import pytest
import timm
import torch

import visattn
from tests.tolerances import SAME_MODEL, relative_error
from tests.works_with.tasks import CLASSES, bars, check_fall, descend

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = visattn.list_models("test_*")
IMAGE = (2, 3, 64, 96)
# Two objects in every image: the left and the right half.
HALVES = torch.zeros(2, *IMAGE[2:])
HALVES[0, :, :48] = HALVES[1, :, 48:] = 1
BOXES = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])
LABELS = torch.tensor([0, 1])
OBJECTS = [{"class_labels": LABELS, "boxes": BOXES}] * IMAGE[0]


def backbone(name, levels):
    return transformers.TimmBackboneConfig(backbone=name, out_indices=list(levels))


def channels(name, levels):
    return timm.create_model(name, features_only=True, out_indices=levels, device="meta").feature_info.channels()


@torch.no_grad()
def test_backbone(works):
    """Also of images of any size, saved and loaded."""
    for name in SMALL:
        config = backbone(name, (1, 2))
        model = transformers.AutoBackbone.from_config(config).eval()
        ours = timm.create_model(name, features_only=True, out_indices=(1, 2)).eval()
        ours.load_state_dict(model._backbone.state_dict())
        assert isinstance(model, transformers.TimmBackbone)
        assert model.channels == ours.feature_info.channels()
        for size in ((64, 64), (97, 131)):
            image = torch.randn(1, 3, *size)
            for got, expected in zip(model(image).feature_maps, ours(image), strict=True):
                assert torch.equal(got, expected)
    works("transformers", "TimmBackbone by AutoBackbone, two image sizes", f"{len(SMALL)} models: features equal")


def mask2former(name):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone(name, (0, 1, 2, 3)),
        **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward"), 32),
        encoder_feedforward_dim=64,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        num_queries=8,
        num_labels=2,
        train_num_points=1024,
    )
    labels = {"mask_labels": [HALVES] * IMAGE[0], "class_labels": [LABELS] * IMAGE[0]}
    return transformers.Mask2FormerForUniversalSegmentation(config), labels


def upernet(name):
    levels = (0, 1, 2, 3)
    config = transformers.UperNetConfig(
        backbone_config=backbone(name, levels),
        hidden_size=32,
        num_labels=2,
        auxiliary_in_channels=channels(name, levels)[2],
        auxiliary_channels=16,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    return model, {"labels": HALVES.argmax(0).expand(IMAGE[0], -1, -1)}


def detr(name):
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone(name, (3,)),
        backbone=None,
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        num_queries=8,
        num_labels=2,
    )
    return transformers.DetrForObjectDetection(config), {"labels": OBJECTS}


def real_time(name, kind, **kwargs):
    levels = (1, 2, 3)
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone(name, levels),
        freeze_backbone_batch_norms=False,
        encoder_in_channels=channels(name, levels),
        **dict.fromkeys(("encoder_hidden_dim", "d_model"), 32),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        decoder_in_channels=[32] * 3,
        decoder_layers=2,
        num_queries=20,
        num_denoising=0,
        **{"num_labels": 2, **kwargs},
    )
    return getattr(transformers, f"{kind}ForObjectDetection")(config), {"labels": OBJECTS}


HEADS = {  # with learning rates
    "Mask2Former": (mask2former, 1e-3),
    "UPerNet": (upernet, 1e-3),
    "DETR": (detr, 1e-2),
    "RT-DETR": (lambda name: real_time(name, "RTDetr"), 2e-3),
    "D-FINE": (lambda name: real_time(name, "DFine", decoder_n_points=[2] * 3), 1e-3),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["test_dinat", "test_biformer"])
def test_trains_under_a_head(works, head, name):
    build, lr = HEADS[head]
    model, labels = build(name)
    image = torch.randn(IMAGE)
    image[..., :48] += 1
    model.train()
    before = next(p for n, p in model.named_parameters() if "patch_embed" in n).clone()
    losses = descend(model.parameters(), lambda: model(pixel_values=image, **labels).loss, lr=lr)
    assert not torch.equal(before, next(p for n, p in model.named_parameters() if "patch_embed" in n))
    works("transformers", f"{head} over `{name}`", check_fall(losses))


@torch.no_grad()
def test_wrapper_saves_and_loads(works, tmp_path):
    """What `save_pretrained` writes, and the folder of a model of timm's `save_for_hf`, as on the hub.

    Not equal in every bit: weights lie in the file, where nothing is aligned as PyTorch does it.
    """
    for name in SMALL:
        image = torch.randn(1, 3, 64, 96)
        config = transformers.TimmWrapperConfig(architecture=name, num_labels=5)
        model = transformers.TimmWrapperForImageClassification(config).eval()
        model.save_pretrained(tmp_path / name)
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / name).eval()
        assert relative_error(loaded(image).logits, model(image).logits) <= SAME_MODEL
        assert model(image).logits.shape == (1, 5)

        ours, folder = timm.create_model(name).eval(), tmp_path / f"timm_{name}"
        timm.models.save_for_hf(ours, folder)
        config = json.loads((folder / "config.json").read_text())
        del config["model_args"]["num_classes"]  # which transformers gives itself, of any model of timm 1.0.31
        (folder / "config.json").write_text(json.dumps(config))
        loaded = transformers.TimmWrapperForImageClassification.from_pretrained(folder).eval()
        assert relative_error(loaded(image).logits, ours(image)) <= SAME_MODEL
        features = transformers.TimmWrapperModel.from_pretrained(folder).eval()
        assert relative_error(features(image).last_hidden_state, ours.forward_features(image)) <= SAME_MODEL
    works(
        "transformers",
        "TimmWrapperForImageClassification, saved and loaded",
        f"{len(SMALL)} models: logits within {SAME_MODEL:.0e}",
    )
    works(
        "transformers",
        "TimmWrapper of timm's `save_for_hf`, its `num_classes` given once",
        f"{len(SMALL)} models: logits and features within {SAME_MODEL:.0e}",
    )


def test_trainer(works, tmp_path):
    pytest.importorskip("accelerate")
    config = transformers.TimmWrapperConfig(architecture="dinat_atto", num_labels=CLASSES)
    images, labels = bars(64)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        seed=0,
    )
    trainer = transformers.Trainer(
        transformers.TimmWrapperForImageClassification(config),
        arguments,
        train_dataset=[{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    works("transformers", "Trainer of TimmWrapperForImageClassification, `dinat_atto`", check_fall(losses))
