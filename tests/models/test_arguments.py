"""What a constructor is given: what would only fail in forward, or mean nothing, is refused when a model is made."""

import math

import pytest
import timm
import torch
from timm.layers import NormMlpClassifierHead

import visattn

OURS = visattn.list_models()
SMALL = [n for n in OURS if n.startswith("test_")]
CHANNELS_FIRST = ("biformer", "coatnet", "halonet", "maxvit", "overlock", "resnest_va", "resnet_ea")
POOLS = ["", "avg", "max", "avgmax", "fastcatavgmax", "token", "map", "xavg", 3]


def works(model):
    with torch.no_grad():
        return model.eval()(torch.randn(1, 3, 32, 64))


@pytest.mark.parametrize("name", SMALL)
def test_pooling_that_cannot_be_classified_is_refused(name):
    """At creation and by `reset_classifier`, which agree but for attention pooling; what passes gives logits."""
    for pool in POOLS:
        made = []
        for make in (
            lambda pool: timm.create_model(name, num_classes=5, global_pool=pool),
            lambda pool: reset(timm.create_model(name, num_classes=0, global_pool=""), 5, pool),
        ):
            try:
                made.append(make(pool))
            except ValueError as error:
                assert "expected global_pool" in str(error)  # noqa: PT017
                assert "; try" in str(error)  # noqa: PT017
        assert all(5 in works(model).shape[1:] for model in made)
        assert len(made) in (0, 2) or pool == "map"
        assert len(made) == 2 or pool not in ("avg", "max", "avgmax")
        assert not made or pool not in ("xavg", 3)


def reset(model, *args):
    model.reset_classifier(*args)
    return model


@pytest.mark.parametrize("name", [name for family in CHANNELS_FIRST for name in visattn.list_models(family=family)])
def test_no_pooling_stays_where_it_works(name):
    model = timm.create_model(name, num_classes=0, global_pool="", device="meta")
    if isinstance(model.get_submodule("head" if hasattr(model, "head") else ""), NormMlpClassifierHead):
        model.reset_classifier(5)
        return
    for refuse in (
        lambda: model.reset_classifier(5, ""),
        lambda: timm.create_model(name, num_classes=5, global_pool="", device="meta"),
    ):
        with pytest.raises(ValueError, match=r"expected global_pool of 'avg', .* got ''; try 'avg', or num_classes=0"):
            refuse()
    assert model.num_classes == 0


SHARED = [
    ("num_classes", [-1, 1.5, "x", math.nan, True, ()]),
    ("in_chans", [-1, 0, 1.5, "x", math.nan, ()]),
    ("drop_rate", [-1, 1.5, "x", math.nan, ()]),
    ("drop_path_rate", [-0.1, 1.5, "x", math.nan, math.inf]),
    ("img_size", [0, -1, 1.5, "x", math.nan, (), (64,), (64, 0), (64, 64, 64)]),
]


@pytest.mark.parametrize("name", SMALL)
def test_shared_arguments_out_of_range_are_refused(name):
    for argument, values in SHARED:
        for value in values:
            with pytest.raises((TypeError, ValueError), match=rf"expected .*{argument}.*, got .*; try"):
                timm.create_model(name, **{argument: value}, device="meta")
    with pytest.raises(TypeError, match=r"expected .*, got .*no_such_argument.*; try"):
        timm.create_model(name, no_such_argument=1)
    model = timm.create_model(name, device="meta")
    for value in (-1, 1.5, "x"):
        with pytest.raises(ValueError, match="expected num_classes of 0 or more"):
            model.reset_classifier(value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_dinat", {"embed_dim": 0}),
        ("test_dinat", {"mlp_ratio": 0}),
        ("test_dinat", {"layer_scale": math.nan}),
        ("test_dinat", {"num_heads": (1, 2, 4, 8, 8)}),
        ("test_dinat_isotropic", {"patch_size": 0}),
        ("test_dinat_isotropic", {"patch_size": ()}),
        ("test_dinat_isotropic", {"depth": -1}),
        ("test_swin_va", {"num_heads": (1, 2, 4)}),
        ("test_swin_va", {"window_size": 0}),
        ("test_biformer", {"qk_scale": "x"}),
        ("test_biformer", {"soft_routing": "x"}),
        ("test_biformer", {"depths": ()}),
        ("test_cswin", {"num_heads": (2, 2, 4, -1)}),
        ("test_coatnet_va", {"bn_eps": -1}),
        ("test_coatnet_va", {"norm_eps": math.nan}),
        ("test_halonet_va", {"value_ratio": 0}),
        ("test_halonet_va", {"final_dim": 0}),
        ("test_halonet_va", {"act_layer": "nonsense"}),
        ("test_maxvit_va", {"embed_dims": (16, 32, 48)}),
        ("test_maxvit_va", {"stem_width": 0}),
        ("test_overlock", {"focus_mlp_ratio": 0}),
        ("test_pvt", {"depths": (1, 2, 1, 2, 2)}),
        ("test_resnest_va", {"base_width": 0}),
        ("test_resnet_ea", {"layers": (1, 2, 1)}),
        ("test_resnet_ea", {"layers": (1, 2, 1, 0)}),
        ("test_resnet_ea", {"ea_key_channels": 0}),
        ("test_transnext", {"pool_size": math.nan}),
        ("test_agent_deit", {"patch_size": 0}),
        ("test_focused_swin", {"attention_args": {"focusing_factor": math.nan}}),
    ],
)
def test_sizes_that_fit_nothing_are_refused(name, arguments):
    with pytest.raises(ValueError, match=r"expected .*, got "):
        timm.create_model(name, **arguments)
