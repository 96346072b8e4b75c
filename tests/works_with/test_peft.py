"""peft: LoRA by the names that people give, trained, and merged into the model."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import visattn
from tests.tolerances import relative_error
from tests.works_with.tasks import bars, check_fall, descend

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

USUAL = ["qkv", "proj"]
# Networks of convolutions have layers of other names.
TARGETS = {
    **dict.fromkeys(visattn.list_models("test_*"), USUAL),
    "test_halonet_va": ["q", "kv"],
    "test_overlock": ["weight_proj", "fc1", "fc2"],
    "test_resnest_va": ["conv1", "conv3"],
    "test_patchconvnet": ["fc", "proj", "kv"],
    "test_patchconvnet_multi": ["fc", "proj", "kv"],
    "test_resnet_ea": ["conv1", "conv2", "conv3"],
    "test_shiftvit": ["fc1", "fc2"],
}
# TransNeXt has linear layers that make its position bias.
EVERYWHERE = dict.fromkeys(["test_deit_va", "test_transnext", "test_dinat"], "all-linear")


def adapt(model, targets):
    """LoRA, and the classifier, which is new, as it is."""
    classifier = model.pretrained_cfg["classifier"].partition(".")[0]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, modules_to_save=[classifier]))


@pytest.mark.parametrize("targets", [TARGETS, EVERYWHERE], ids=["usual", "everywhere"])
def test_lora(works, targets):
    """Every adapter learns; what is merged is the model again, and gives the same."""
    falls, worst = [], 0
    images, labels = bars()
    for name, names in targets.items():
        model = timm.create_model(name, num_classes=4)
        keys = model.state_dict().keys()
        adapted = adapt(model, names)
        trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
        before = copy.deepcopy(trained)
        losses = descend(trained.values(), lambda f=adapted: F.cross_entropy(f(images), labels), lr=3e-3)
        check_fall(losses)
        assert not [key for key, p in trained.items() if "lora_" in key and torch.equal(p, before[key])]
        falls.append(sum(losses[-3:]) / sum(losses[:3]))
        with torch.no_grad():
            adapted, exact = adapted.eval().double(), images.double()
            expected = adapted(exact)
            merged = adapted.merge_and_unload()
            worst = max(worst, relative_error(merged(exact), expected))
        assert merged.state_dict().keys() == keys
    assert worst <= 1e-6
    words = ", ".join(dict.fromkeys(str(names) for names in targets.values()))
    measured = f"loss to {min(falls):.0%} - {max(falls):.0%} in 20 steps, merged within {worst:.0e} in float64"
    works("peft", f"LoRA, `target_modules` of {words}", f"{len(targets)} models: {measured}")


@torch.no_grad()
def test_saved_adapters(works, tmp_path):
    model, (images, _) = timm.create_model("test_dinat", num_classes=4), bars()
    adapted = adapt(copy.deepcopy(model), USUAL).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path)
    error = relative_error(peft.PeftModel.from_pretrained(model, tmp_path).eval()(images), adapted(images))
    assert error <= 1e-6
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    measured = f"`test_dinat`: within {error:.0e}, {size / 1e3:.0f} kB"
    works("peft", "save_pretrained, PeftModel.from_pretrained", measured)
