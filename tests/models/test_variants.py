"""Tables of variants: what the registered functions say, and names that were given up."""

import pytest
import timm

import visattn
from visattn.models import FAMILIES

RENAMED = (
    *("cswin_tiny", "cswin_small", "cswin_base", "cswin_base_384", "cswin_large", "cswin_large_384", "test_cswin"),
    *("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large", "test_pvt"),
)


@pytest.mark.parametrize("name", visattn.list_models("test_*"))
def test_the_docstring_names_the_class(name):
    model = timm.create_model(name, device="meta")
    assert timm.model_entrypoint(name).__doc__.startswith(f"`{name}`: {type(model).__name__}(")


@pytest.mark.parametrize("name", visattn.list_models())
def test_the_docstring_names_the_weights(name):
    doc = timm.model_entrypoint(name).__doc__
    published = {tagged.partition(".")[2] for tagged in visattn.list_models(name, pretrained=True)}
    for tag in published or {"untrained"}:
        cfg = timm.get_pretrained_cfg(f"{name}.{tag}")
        end = ")" if published else ", none published)"
        height, width = cfg.input_size[1:]
        assert f"{tag} ({height} x {width}, {cfg.num_classes} classes{end}" in doc
    assert doc.partition("the default first: ")[2].startswith(timm.get_pretrained_cfg(name).tag)


@pytest.mark.parametrize("name", RENAMED)
def test_names_with_the_infix_of_before_warn_and_build_the_model(name):
    cfg = timm.get_pretrained_cfg(name)
    for old in (f"{name}_va", f"{name}_va.{cfg.tag}"):
        with pytest.warns(UserWarning, match=f"Mapping deprecated model name {name}_va to current {name}"):
            model = timm.create_model(old, device="meta")
        assert model.pretrained_cfg["architecture"] == name
        assert model.pretrained_cfg["tag"] == cfg.tag
        assert visattn.is_model(old)
    assert f"{name}_va" not in visattn.list_models()
    assert name in visattn.list_models()


def test_models_of_one_family_or_pattern():
    by_family = [name for family in FAMILIES for name in visattn.list_models(family=family)]
    assert sorted(by_family) == sorted(visattn.list_models())
    assert timm.list_models(module="nat") == visattn.list_models(family="nat")
    assert timm.list_models(module=FAMILIES) == visattn.list_models()
    assert visattn.list_models("dinat_s_*", pretrained=True)[0] == "dinat_s_base.in1k"
    assert visattn.list_models("*_base", family="cswin") == [
        f"{attention}cswin_base" for attention in ("agent_", "", "efficient_", "focused_", "inline_")
    ]
    assert not visattn.is_model("resnet50")
    with pytest.raises(ValueError, match=r"expected a family of biformer, .*got 'resnet'; try"):
        visattn.list_models(family="resnet")
