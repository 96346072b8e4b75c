"""The tables behind test_families.py: goldens and counts of the official codes, sizes, attentions and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.models import golden as goldens
from visattn.models.coatnet import TIMM_OPTIONS
from visattn.ops.geometry import ceil_div


@dataclass(frozen=True)
class Golden:
    """An official model's file, and ours that equals it at `inputs` images."""

    file: str
    name: str
    args: dict[str, Any] = field(default_factory=dict)
    inputs: int = 1
    run: Callable = goldens.last

    def __str__(self):
        return "-".join([self.file, self.name, *self.args])


def dense_agents(sides):
    return [{"num_agents": n, "agent_size": (s, s)} for n, s in zip((9, 16, 49, 49), sides, strict=True)]


TIMM_HALONET = {"num_heads": (8, 8, 8, 8), "mask_border": False, "project_first": False}
DENSE_SWIN = {"out_norm": "layer", "always_shift": True, "attention_args": dense_agents((9, 12, 14, 7))}
DENSE_PVT = {"attention_args": dense_agents((12, 16, 28, 28))}
GOLDENS = [
    # inputs with the official weights, and one with others
    Golden("biformer_tiny", "biformer_tiny", inputs=2 + 1),
    Golden("biformer_tiny", "biformer_tiny", {"padding": "project"}, inputs=2 + 1),
    Golden("biformer_tiny_autopad", "biformer_tiny", {"padding": "project"}, inputs=4 + 1),
    Golden("biformer_stl", "biformer_stl"),
    Golden("biformer_stl_nchw", "biformer_stl_nchw", inputs=2),
    Golden("timm_coatnet_0_224", "coatnet_0_va", {"head_hidden_size": 768, **TIMM_OPTIONS}),
    Golden("timm_coatnet_0_rw_224", "coatnet_0_rw_va"),
    Golden("convit_tiny", "convit_tiny_va", run=goldens.late_token),
    Golden("agent_cswin_t", "agent_cswin_tiny"),
    Golden("inline_cswin_t", "inline_cswin_tiny"),
    Golden("agent_deit_t", "agent_deit_tiny", run=goldens.tokens),
    Golden("inline_deit_t", "inline_deit_tiny", run=goldens.tokens),
    Golden("flowformer_cv", "flowformer_small"),
    Golden("timm_halonet26t", "halonet26t_va", inputs=2),
    Golden("timm_halonet_h1", "halonet_h1_va", TIMM_HALONET, inputs=2),
    Golden("l2vit_tiny", "l2vit_tiny", inputs=2),
    Golden("l2vit_tiny_sizes", "l2vit_tiny", inputs=3),
    Golden("timm_maxvit_tiny_tf_224", "maxvit_tiny_va"),
    Golden("timm_maxvit_tiny_tf_384", "maxvit_tiny_va.tf_384_in1k"),
    Golden("torchvision_maxvit_t", "maxvit_t_va"),
    Golden("nat_mini", "nat_mini", inputs=2),
    Golden("dinat_mini", "dinat_mini", inputs=2),
    Golden("dinat_small", "dinat_small", inputs=2),
    Golden("dinat_s_tiny", "dinat_s_tiny", inputs=2),
    Golden("dinat_isotropic_small", "dinat_isotropic_small", run=goldens.every_third),
    Golden("vitrpb_small", "vitrpb_small", run=goldens.every_third),
    # files of four stages: after every quarter of the blocks, as tokens; "anysize" has the last one, as a map
    Golden("patchconvnet_s60", "patchconvnet_s60", run=goldens.quarters),
    Golden("patchconvnet_s60_multi", "patchconvnet_s60_multi", run=goldens.quarters),
    Golden("patchconvnet_s60_anysize", "patchconvnet_s60", inputs=3, run=goldens.final),
    Golden("overlock_xt", "overlock_xt", inputs=1 + 1, run=goldens.without_context),
    Golden("overlock_xt_reparam", "overlock_xt_reparam", inputs=4),
    Golden("overlock_xt_det", "overlock_xt", {"features_only": True, "out_norm": "detection"}, 2, goldens.extracted),
    Golden("agent_pvt_t", "agent_pvt_tiny"),
    Golden("agent_pvt_t_sr", "agent_pvt_tiny", {"sr_ratios": (8, 4, 2, 1)}),
    Golden("inline_pvt_t", "inline_pvt_tiny", inputs=3),
    Golden("agent_pvt_t_dense", "agent_pvt_tiny", {"features_only": True, **DENSE_PVT}, 3, goldens.extracted),
    Golden("official_resnest50", "resnest50_va", inputs=2),
    Golden("official_resnest50_fast_1s1x64d", "resnest50_fast_1s1x64d_va", inputs=2),
    Golden("official_resnest50_fast_4s2x40d", "resnest50_fast_4s2x40d_va", inputs=2),
    Golden("shiftvit_light_tiny", "shiftvit_light_tiny", inputs=2),
    Golden("shiftvit_r2_tiny", "shiftvit_r2_tiny", inputs=2),
    Golden("shiftvit_r4_tiny", "shiftvit_r4_tiny", inputs=4),
    Golden("agent_swin_t", "agent_swin_tiny"),
    Golden("agent_swin_b", "agent_swin_base"),
    Golden("inline_swin_t", "inline_swin_tiny"),
    Golden("agent_swin_t_dense", "agent_swin_tiny", {"features_only": True, **DENSE_SWIN}, 3, goldens.extracted),
    Golden("transnext_micro", "transnext_micro", run=goldens.normed),
    Golden("transnext_micro_256_pt224", "transnext_micro", run=goldens.normed),
    Golden("transnext_micro_384_linear7", "transnext_micro", {"pool_size": 7}, run=goldens.normed),
    Golden("transnext_tiny_dense_extrap", "transnext_tiny", {"num_classes": 0}, 4, goldens.normed),
]

# Of the official codes, or counted once where there is none.
PARAMETERS = {
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "coatnet_0_va": 24_446_228,
    "coatnet_1_va": 41_635_184,
    "coatnet_2_va": 73_635_144,
    "coatnet_3_va": 164_605_432,
    "coatnet_4_va": 273_064_456,
    "coatnet_5_va": 682_856_600,
    "coatnet_6_va": 1_344_238_688,
    "coatnet_7_va": 2_432_532_472,
    "convit_tiny_va": 5_710_512,
    "convit_small_va": 27_777_322,
    "convit_base_va": 86_540_040,
    "cswin_tiny": 22_320_552,
    "cswin_small": 34_643_304,
    "cswin_base": 77_382_184,
    "cswin_base_384": 77_382_184,
    "cswin_large": 173_262_664,
    "cswin_large_384": 173_262_664,
    "agent_cswin_tiny": 20_458_672,
    "agent_cswin_small": 32_814_100,
    "agent_cswin_base": 73_249_696,
    "agent_cswin_base_384": 73_328_416,
    "inline_cswin_tiny": 20_604_520,
    "inline_cswin_small": 33_032_872,
    "inline_cswin_base": 73_413_640,
    "efficient_cswin_tiny": 20_386_920,
    "efficient_cswin_small": 32_706_472,
    "efficient_cswin_base": 73_039_240,
    "focused_cswin_tiny": 21_195_368,
    "focused_cswin_small": 33_919_144,
    "focused_cswin_base": 74_852_632,
    "deit_tiny_va": 5_717_416,
    "deit_small_va": 22_050_664,
    "deit_base_va": 86_567_656,
    "agent_deit_tiny": 6_015_640,
    "agent_deit_small": 22_647_112,
    "agent_deit_small_448": 23_070_472,
    "agent_deit_base": 87_204_904,
    "inline_deit_tiny": 6_477_736,
    "inline_deit_small": 16_734_760,
    "inline_deit_base": 23_797_096,
    "focused_deit_tiny": 6_191_272,
    "efficient_deit_tiny": 5_717_416,
    "flowformer_small": 43_311_304,
    "halonet_h0_va": 5_502_248,
    "halonet_h1_va": 8_105_576,
    "halonet_h2_va": 9_405_608,
    "halonet_h3_va": 11_842_792,
    "halonet_h4_va": 19_103_464,
    "halonet_h5_va": 30_718_952,
    "halonet_h6_va": 43_458_280,
    "halonet_h7_va": 67_434_728,
    "halonet_h4_base128_va": 68_413_416,
    "halonet_h4_base128_conv12_va": 69_876_072,
    "halonet26t_va": 12_480_288,
    "halonet50ts_va": 22_733_280,
    "l2vit_tiny": 28_596_781,
    "l2vit_small": 50_199_157,
    "l2vit_base": 88_577_188,
    "l2vit_base_384": 88_577_188,
    "maxvit_tiny_va": 30_916_528,
    "maxvit_tiny_va.tf_384_in1k": 30_977_008,
    "maxvit_tiny_va.tf_512_in1k": 31_049_584,
    "maxvit_small_va": 68_927_956,
    "maxvit_base_va": 119_467_708,
    "maxvit_base_va.tf_224_in21k": 135_495_975,
    "maxvit_large_va": 211_785_560,
    "maxvit_xlarge_va": 475_323_472,
    "maxvit_xlarge_va.tf_224_in21k": 506_987_643,
    "maxvit_t_va": 30_919_624,
    "nat_mini": 19_984_174,
    "dinat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "dinat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "dinat_small": 50_719_681,
    "nat_base": 89_769_652,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "nat_isotropic_small": 21_999_736,
    "dinat_isotropic_small": 21_999_736,
    "vitrpb_small": 22_080_376,
    "patchconvnet_s60": 25_231_096,
    "patchconvnet_s120": 47_723_896,
    "patchconvnet_b60": 99_388_936,
    "patchconvnet_b120": 188_611_336,
    "patchconvnet_l60": 176_009_576,
    "patchconvnet_l120": 334_294_376,
    "patchconvnet_s60_multi": 25_614_712,
    "overlock_xt": 17_307_272,
    "overlock_t": 34_990_472,
    "overlock_s": 58_309_772,
    "overlock_b": 98_012_968,
    "overlock_xt_reparam": 16_791_384,
    "overlock_t_reparam": 33_981_064,
    "overlock_s_reparam": 56_670_476,
    "overlock_b_reparam": 95_520_680,
    "pvt_tiny": 13_229_288,
    "pvt_small": 24_485_864,
    "pvt_medium": 44_208_104,
    "pvt_large": 61_369_320,
    "agent_pvt_tiny": 11_570_352,
    "agent_pvt_small": 20_635_066,
    "agent_pvt_medium": 35_921_746,
    "agent_pvt_medium_256": 36_083_682,
    "agent_pvt_large": 48_738_180,
    "inline_pvt_tiny": 12_032_232,
    "inline_pvt_small": 21_556_136,
    "inline_pvt_medium": 37_618_856,
    "inline_pvt_large": 51_154_280,
    "focused_pvt_tiny": 12_149_480,
    "efficient_pvt_tiny": 11_356_392,
    "resnest14_va": 10_611_688,
    "resnest26_va": 17_069_448,
    "resnest50_va": 27_483_240,
    "resnest101_va": 48_275_016,
    "resnest200_va": 70_201_544,
    "resnest269_va": 110_929_480,
    "resnest50_fast_1s1x64d_va": 26_217_896,
    "resnest50_fast_2s1x64d_va": 27_483_240,
    "resnest50_fast_4s2x40d_va": 30_417_592,
    "resnest50_fast_1s4x24d_va": 25_677_000,
    "shiftvit_light_tiny": 19_608_328,
    "shiftvit_light_small": 33_796_360,
    "shiftvit_light_base": 59_708_776,
    "shiftvit_r4_tiny": 31_426_312,
    "shiftvit_r4_small": 51_523_336,
    "shiftvit_r4_base": 87_271_528,
    "shiftvit_r2_tiny": 28_566_664,
    "shiftvit_r2_small": 50_304_136,
    "shiftvit_r2_base": 89_026_408,
    "swin_tiny_va": 28_288_354,
    "swin_small_va": 49_606_258,
    "swin_base_va": 87_768_224,
    "swin_base_va.ms_in1k_384": 87_903_584,
    "agent_swin_tiny": 28_902_964,
    "agent_swin_small": 49_666_684,
    "agent_swin_small_288": 49_707_964,
    "agent_swin_base": 88_095_096,
    "agent_swin_base_384": 88_305_016,
    "inline_swin_tiny": 29_223_544,
    "inline_swin_small": 49_793_296,
    "inline_swin_base": 88_350_120,
    # no official counts: the control's, less 169 table entries per head of a block without windows; "focused" has
    # (tokens + 1) * width + 26 * head width more
    "efficient_swin_tiny": 28_285_312,
    "efficient_swin_small": 49_603_216,
    "efficient_swin_base": 87_764_168,
    "focused_swin_tiny": 29_192_384,
    "focused_swin_small": 50_510_288,
    "focused_swin_base": 88_972_488,
    "transnext_micro": 12_809_304,
    "transnext_tiny": 28_258_960,
    "transnext_small": 49_741_564,
    "transnext_base": 89_721_496,
    "transnext_micro_aaaa": 13_114_008,
}
# Millions as papers and repositories print them.
PUBLISHED = {
    "coatnet_0_va": pytest.approx(25, rel=0.03),
    "coatnet_1_va": pytest.approx(42, rel=0.03),
    "coatnet_2_va": pytest.approx(75, rel=0.03),
    "coatnet_3_va": pytest.approx(168, rel=0.03),
    "coatnet_4_va": pytest.approx(275, rel=0.03),
    "coatnet_5_va": pytest.approx(688, rel=0.03),
    "coatnet_6_va": pytest.approx(1345, rel=0.03),  # as printed; the paper says 1470
    "coatnet_7_va": pytest.approx(2440, rel=0.03),
    "resnest50_fast_4s1x64d_va": pytest.approx(31.9, abs=0.05),
    "resnest50_fast_1s2x40d_va": pytest.approx(25.9, abs=0.05),
    "resnest50_fast_2s2x40d_va": pytest.approx(26.9, abs=0.05),
}

# Ours, and those of timm's whose weights they take.
TAGS = {
    "coatnet_*_va": ["coatnet_*_rw*_224", "coatnet_rmlp_2_rw_384"],
    "convit_*_va": ["convit_*"],
    "halonet*_va": ["halonet26t", "halonet50ts"],
    "maxvit_*_va": ["maxvit_*_tf_*"],
    "swin_*_va": ["swin_tiny_*", "swin_small_*", "swin_base_*"],
}

# Models whose filter is given a state dict of their own.
NATIVE = [
    "biformer_tiny", "biformer_stl_nchw", "test_biformer",
    "coatnet_rmlp_2_rw_va",
    "convit_small_va", "test_convit_va",
    "test_cswin", "agent_cswin_tiny", "inline_cswin_tiny", "focused_cswin_tiny",
    "deit_tiny_va", "agent_deit_tiny", "focused_deit_tiny", "test_agent_deit",
    "flowformer_small", "test_flowformer",
    "halonet26t_va", "test_halonet_va",
    "l2vit_tiny", "test_l2vit",
    "test_maxvit_va", "maxvit_t_va",
    "dinat_s_tiny", "nat_small", "vitrpb_small", "test_dinat",
    "test_patchconvnet", "test_patchconvnet_multi",
    "overlock_xt", "overlock_xt_reparam", "test_overlock",
    "pvt_tiny", "agent_pvt_tiny", "inline_pvt_tiny", "test_pvt", "test_inline_pvt",
    "resnest50_fast_4s2x40d_va", "test_resnet_ea",
    "test_shiftvit",
    "test_swin_va", "test_agent_swin", "test_focused_swin", "inline_swin_tiny",
    "test_transnext", "transnext_micro_aaaa",
]  # fmt: skip


@dataclass(frozen=True)
class File:
    """A golden's official weights as a file, our model, its first convolution, and an entry that stays as it is."""

    golden: str
    name: str
    first: str
    kept: str
    wrapper: str | None = None
    args: dict[str, Any] = field(default_factory=dict)  # of the model with other channels and classes
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # there
    run: Callable = goldens.last


AGENTS_AT_96 = {"args": {"img_size": 96}, "shapes": {"stages.0.blocks.1.attn.ah_bias": (1, 2, 9, 24, 1)}}
FILES = [
    File("biformer_stl_nchw", "biformer_stl_nchw", "patch_embed.conv.0", "stages.2.blocks.1.attn.lepe.weight", "model"),
    File("convit_tiny", "convit_tiny_va", "patch_embed.proj", "blocks.9.attn.pos_proj.weight",
         run=goldens.late_token),
    File("agent_cswin_t", "agent_cswin_tiny", "patch_embed.proj", "stages.3.downsample.reduction.weight", "model",
         **AGENTS_AT_96),
    File("flowformer_cv", "flowformer_small", "patch_embed.proj", "stages.3.downsample.weight", "model",
         args={"img_size": 96}, shapes={"patch_embed.pos_embed": (1, 24, 24, 96)}),
    File("timm_halonet26t", "halonet26t_va", "patch_embed.conv1.conv", "stages.2.blocks.1.conv1.conv.weight"),
    File("l2vit_tiny", "l2vit_tiny", "patch_embed.conv.0", "stages.2.blocks.1.attn.temperature", "model_ema"),
    File("nat_mini", "nat_mini", "patch_embed.conv.0", "stages.2.blocks.1.attn.rpb"),
    File("patchconvnet_s60_multi", "patchconvnet_s60_multi", "patch_embed.conv.0", "stages.3.blocks.0.proj.weight",
         "model", shapes={"head.cls_token": (1, 5, 384)}, run=goldens.quarters),
    File("overlock_xt", "overlock_xt", "patch_embed.0.conv", "focus.0.blocks.1.mix.rpb2", run=goldens.without_context),
    File("official_resnest50", "resnest50_va", "patch_embed.conv1", "stages.2.blocks.1.conv2.fc1.weight"),
    File("shiftvit_light_tiny", "shiftvit_light_tiny", "patch_embed.proj", "stages.3.downsample.reduction.weight",
         "model"),
    File("agent_swin_t", "agent_swin_tiny", "patch_embed.proj", "stages.3.downsample.reduction.weight", "model"),
    File("transnext_micro", "transnext_micro", "patch_embed.proj", "stages.2.blocks.1.attn.tokens", "model",
         run=goldens.normed),
]  # fmt: skip


def floor(size, stride):
    """Of patches that drop what is left over, but for maps smaller than a patch."""
    return max(1, size // stride)


def stem_floor(size, stride):
    """CSWin's stem has no token for one or two last pixels; stages round up."""
    return ceil_div(max(1, (size + 1) // 4), stride // 4)


@dataclass(frozen=True)
class Sizes:
    """A model that takes any image, one size after another; the strides of its levels, and how they round."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    strides: tuple[int, ...] = (4, 8, 16, 32)
    number: Callable[[int, int], int] = ceil_div
    more: tuple[tuple[int, int], ...] = ()
    sizes: tuple[tuple[int, int], ...] = ((224, 224), (256, 192), (97, 131), (32, 32), (1, 1))

    def __str__(self):
        return f"{self.name}-{self.args}"


CONVOLUTIONAL = (2, 4, 8, 16, 32)
LARGE = ((800, 1216),)
TWO_SIZES = ((97, 131), (800, 1216))
SQUARE = ((512, 512),)
LONG = ((64, 448), (448, 64))  # and two with as many patches as the size that a model is made for
EXTRACTORS = [
    *(Sizes("test_biformer", {"padding": p}, more=SQUARE) for p in ("mask", "project", "zero")),
    Sizes("test_biformer", {"padding": "zero", "layout": "swin", "before_attn_dwconv": 0}, number=floor, more=SQUARE),
    Sizes("biformer_tiny", {"n_win": "classification"}, sizes=TWO_SIZES),
    Sizes("biformer_tiny", {"n_win": "detection", "out_norm": "layer"}, sizes=TWO_SIZES),
    Sizes("test_coatnet_va", {}, CONVOLUTIONAL, more=LARGE),
    Sizes("test_coatnet_va", {"rel_pos_dim": 8, "stride_mode": "pool", "pool": "max3"}, CONVOLUTIONAL, more=LARGE),
    Sizes("test_convit_va", {"out_indices": (1, 2)}, (16, 16), more=(*LARGE, *LONG, (64, 400), (400, 64))),
    Sizes("test_cswin", number=stem_floor),
    Sizes("test_efficient_cswin", number=stem_floor),
    Sizes("test_deit_va", {"out_indices": (1, 3)}, (16, 16), more=(*LONG, (64, 400), (400, 64))),
    Sizes("test_agent_deit", {"out_indices": (1, 3)}, (16, 16), more=(*LONG, (64, 400), (400, 64))),
    Sizes("test_flowformer", {}, (2, 4, 8, 16), floor, more=(*LARGE, *LONG)),
    *(Sizes(name, {}, CONVOLUTIONAL) for name in ("test_halonet_va", "halonet26t_va", "halonet_h3_va")),
    Sizes("test_l2vit", {"out_norm": "layer"}, more=LARGE),
    Sizes("test_maxvit_va", {}, CONVOLUTIONAL, more=LARGE),
    Sizes("test_maxvit_va", {"window_size": "grow"}, CONVOLUTIONAL, more=LARGE),
    Sizes("test_maxvit_va", {"form": "torchvision"}, CONVOLUTIONAL, more=LARGE),
    Sizes("test_dinat"),
    Sizes("test_dinat_isotropic", {}, (16, 16, 16)),
    Sizes("test_isotropic_vitrpb", {}, (16, 16, 16)),
    Sizes("dinat_s_tiny"),
    Sizes("test_patchconvnet", {}, (16, 16, 16), more=LARGE),
    Sizes("test_overlock", {"kernel_sizes": (7, 7, 13, 7)}, more=(*LARGE, *LONG)),
    Sizes("test_overlock", {"out_norm": "detection"}),
    Sizes("test_pvt", {}, (2, 4, 8, 16), floor, more=(*LONG, (40, 640), (640, 40))),
    Sizes("test_inline_pvt", {}, (2, 4, 8, 16), floor, more=(*LONG, (40, 640), (640, 40))),
    Sizes("test_resnest_va", {"in_chans": 5}, CONVOLUTIONAL),
    Sizes("test_resnest_va", {"in_chans": 5, "output_stride": 8}, (2, 4, 8, 8, 8)),
    Sizes("test_resnet_ea", {}, CONVOLUTIONAL, sizes=((33, 65), (160, 97))),
    Sizes("test_shiftvit", number=floor, more=LARGE),
    Sizes("test_swin_va"),
    Sizes("test_swin_va", {"depths": (2, 2, 2, 2), "always_shift": True, "out_norm": "layer"}),
    Sizes("test_agent_swin"),
    Sizes("test_focused_swin"),
    Sizes("test_transnext", {"sr_ratios": (8, 4, 2, 1)}, more=SQUARE),
    Sizes("test_transnext", {"sr_ratios": (8, 4, 2, 1), "pool_size": 4}, more=SQUARE),
    Sizes(
        "test_transnext", {"sr_ratios": (8, 4, 2, 1), "position_bias": "interpolate", "bias_img_size": 96}, more=SQUARE
    ),
]
CLASSIFIERS = [
    Sizes("test_convit_va", more=(*LONG, (64, 400), (400, 64))),
    Sizes("agent_cswin_tiny", {"depths": (1, 1, 1, 1), "attention_depths": (1, 1, 0, 0)}),
    Sizes("test_deit_va", more=(*LONG, (64, 400), (400, 64))),
    Sizes("test_agent_deit", more=(*LONG, (64, 400), (400, 64))),
    Sizes("test_flowformer", more=LONG),
    Sizes("halonet26t_va", sizes=LARGE),
    Sizes("dinat_mini", more=LARGE),
    Sizes("test_patchconvnet_multi", more=(*LONG, *LARGE)),
    Sizes("test_pvt", more=(*LONG, (40, 640), (640, 40))),
    Sizes("test_inline_pvt", more=(*LONG, (40, 640), (640, 40))),
    Sizes("resnest14_va", sizes=LARGE),
    Sizes("transnext_micro", sizes=((1, 1), (512, 512), *TWO_SIZES)),
]

STRIDED = [  # models with `output_stride`
    Sizes("test_biformer"),
    Sizes("test_biformer", {"layout": "swin", "padding": "zero"}, number=floor),
    Sizes("test_coatnet_va", {"depths": (1, 1, (3, 1), 1)}),
    Sizes("test_cswin", number=stem_floor),
    Sizes("test_dinat"),
    Sizes("test_dinat", {"overlapped": False}),
    Sizes("test_flowformer", {"patch_size": 4}, number=floor),
    Sizes("test_focused_swin"),
    Sizes("test_halonet_va"),
    Sizes("test_l2vit"),
    Sizes("test_maxvit_va", {"window_size": "grow"}),
    Sizes("test_pvt", {"patch_size": 4}, number=floor),
    Sizes("test_inline_pvt", number=floor),
    Sizes("test_resnest_va"),
    Sizes("test_resnet_ea"),
    Sizes("test_shiftvit", number=floor),
    Sizes("test_swin_va"),
    Sizes("test_transnext"),
]

# Made of convolutions and neighborhood attention alone, with an image size.
DILATIONS = ((1, 4), (1, 2), (1, 2), (2,))
CONV_MIXERS = {"topks": (0, 0, 0, 0)}
ATROUS = [
    ("test_dinat", {"dilations": DILATIONS}, (197, 131)),
    ("test_dinat", {"dilations": DILATIONS, "overlapped": False}, (197, 131)),
    ("test_biformer", CONV_MIXERS, (97, 131)),
    ("test_biformer", {"layout": "swin", **CONV_MIXERS}, (96, 128)),
]
DILATED = [  # with convolutions in the blocks of the last stage
    ("test_biformer", {"mlp_dwconv": True}),
    ("test_cswin", {}),
    ("test_l2vit", {}),
    ("test_pvt", {"patch_size": 4, "attention": "agent", "sr_ratios": (1, 1, 1, 1)}),
    ("test_pvt", {"patch_size": 4, "attention": "agent", "class_token": False}),
    ("test_swin_va", {"attention": "focused"}),
    ("test_transnext", {}),
]


@dataclass(frozen=True)
class Mixed:
    """A model whose attention can be chosen, which blocks have the chosen one, and two sizes to train at."""

    name: str
    args: dict[str, Any]
    chosen: tuple[int, ...]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    attention_args: dict[str, dict[str, Any]] = field(default_factory=dict)  # by attention

    def __str__(self):
        return f"{self.name}-{self.args}"


CSWIN = {"attention_depths": (1, 1, 1, 0), "img_size": 64}
SWIN = {"attention_depths": (1, 2, 1, 1)}
MIXED = [
    Mixed("test_cswin", CSWIN, (1, 1, 1, 0, 0), ((64, 64), (97, 40)), {"inline": {"lepe": True}}),
    Mixed("test_deit_va", {"num_classes": 5}, (1,) * 4, ((160, 160), (70, 128))),
    *(Mixed("test_pvt", {"num_classes": 5, "class_token": token}, (1,) * 6, ((96, 96), (70, 128)))
      for token in (False, True)),
    Mixed("test_swin_va", SWIN, (1, 0, 1, 1, 1, 0, 1), ((96, 160), (97, 131))),
]  # fmt: skip

REFUSED_BY_VALUE = {
    "biformer_tiny": [
        ({"output_stride": 0}, "expected output_stride 8, 16 or 32, got 0"),
        ({"layout": "swim"}, "expected layout 'biformer' or 'swin', got 'swim'"),
        ({"topks": (1, 4, 16)}, r"expected one of topks for each of 4 stages, got \(1, 4, 16\)"),
        ({"topks": (1, 4, 16, -4)}, "got 7 and -4"),
        ({"n_win": "dense"}, "expected n_win of .*'detection'.* got 'dense'"),
        ({"n_win": (7, 7, 7)}, "one per each of 4 stages"),
        ({"n_win": 0}, "expected n_win of at least 1"),
        ({"qk_dims": (16, 128, 256, 512)}, "divisible by num_heads, got 64, 16 and 0"),
        ({"before_attn_dwconv": 2}, "expected an odd kernel_size, got 2"),
    ],
    "test_coatnet_va": [
        ({"depths": (1, 1, 2)}, "expected depths, block_types and embed_dims with equally many stages and parts"),
        ({"depths": (1, 1, (1, 1, 1), 1)}, "equally many stages and parts"),
        ({"block_types": ("C", "C", ("C", "M"), "T")}, "expected block_types 'C' and 'T'"),
        ({"norm": "group"}, "expected norm 'layer' or 'batch', got 'group'"),
        ({"output_stride": 4}, "expected output_stride 8, 16 or 32, got 4"),
        ({"pool": "max"}, "expected a pool of"),
        ({"head_dim": 20}, "expected dim divisible by num_heads"),
    ],
    "test_convit_va": [
        ({"local_up_to": 0}, "expected local_up_to from 1 to 2 of 3 blocks, got 0"),
        ({"local_up_to": 3}, "expected local_up_to from 1 to 2 of 3 blocks, got 3"),
        ({"num_heads": 5}, "expected dim divisible by num_heads, got 32 and 5"),
    ],
    "test_cswin": [
        ({"output_stride": 12}, "expected output_stride 8, 16 or 32, got 12"),
        ({"attention": "cosine"}, "expected attention of 'softmax', .*, got 'cosine'"),
        ({"attention_depths": (1, 1)}, r"expected attention_depths of 0 to \[1, 1, 2, 1\] per stage, got \[1, 1\]"),
        ({"attention_depths": (1, 1, 3, 0)}, r"per stage, got \[1, 1, 3, 0\]"),
        ({"attention_args": [{}] * 3}, "expected attention_args, a dict or 4 of them, got 3"),
        ({"split_sizes": (1, 0, 7, 7)}, "expected split_size of at least 1"),
    ],
    "test_deit_va": [
        ({"attention_depths": 5}, r"expected attention_depths of 0 to \[4\] per stage, got \[5\]"),
        ({"attention": "performer"}, "expected attention of 'softmax', .* got 'performer'"),
        ({"num_heads": 5}, "expected dim divisible by num_heads, got 96 and 5"),
    ],
    "test_flowformer": [
        ({"output_stride": 4}, "expected output_stride 8, 16 or 32, got 4"),
        ({"num_heads": (3, 3, 5, 3)}, "expected dim divisible by num_heads, got 96 and 5"),
        ({"out_norm": "batch"}, "expected out_norm None or one of"),
    ],
    "test_halonet_va": [
        ({"blocks": ("aa", "aa", "aa")}, "expected blocks as one string of 'a' and 'c' for each of the 4 entries"),
        ({"blocks": ("aa", "aa", "ab", "aa")}, "got .*'ab'"),
        ({"blocks": ("aa", "", "aa", "aa")}, r"try \('ccc'"),
        ({"output_stride": 4}, "expected output_stride 8, 16 or 32, got 4"),
        ({"num_heads": (3, 3, 3, 3)}, "divisible by 3 heads, got 32 and 48"),
    ],
    "test_l2vit": [
        ({"output_stride": 4}, "expected output_stride 8, 16 or 32, got 4"),
        ({"num_heads": (3, 4, 8, 12)}, "expected dim divisible by num_heads, got 16 and 3"),
        ({"window_size": 0}, "expected window_size of one int or two, at least 1, got 0"),
        ({"out_norm": "batch"}, "expected out_norm None or one of"),
    ],
    "test_maxvit_va": [
        ({"form": "keras"}, "expected form 'google' or 'torchvision', got 'keras'"),
        ({"output_stride": 4}, "expected output_stride 8, 16 or 32, got 4"),
        ({"img_size": 0}, r"expected img_size of (type|one) int"),
        ({"window_size": "huge"}, "expected window_size 'image', 'grow', or one int or two, at least 1, got 'huge'"),
        ({"window_size": (7, 0)}, r"expected window_size 'image', .* got \(7, 0\)"),
        ({"table_size": 0}, "expected table_size of one int or two, at least 1, got"),
    ],
    "test_dinat": [
        ({"output_stride": 4}, "expected output_stride 8, 16 or 32, got 4"),
        ({"dilations": "dense"}, "expected dilations of one of .*'detection'.*got 'dense'"),
        ({"dilations": [[1], [1], [1], [1]]}, r"expected dilations for depths \(2, 2, 2, 1\)"),
        ({"dilations": [[1, 2]]}, "one per block"),
    ],
    "test_dinat_isotropic": [
        ({"dilations": [1, 2]}, "expected 4 dilations"),
        ({"dilations": "detection"}, "got 'detection'"),
    ],
    "test_patchconvnet": [
        ({"embed_dim": 36}, "expected embed_dim divisible by 8, got 36; try 40"),
        ({"global_pool": "catavgmax"}, "expected global_pool of '', 'token', .* got 'catavgmax'"),
    ],
    "test_overlock": [
        ({"output_stride": 16}, "expected output_stride 32, at which the overview lies, got 16"),
        (
            {"depths": (1, 1, 1)},
            "expected 4 depths, embed_dims and kernel_sizes, .*, got 3, 4 and 4, and 2 and 2",
        ),
        ({"focus_depths": (1, 1, 1)}, "got 4, 4 and 4, and 3 and 2"),
        ({"kernel_sizes": (7, 7, 7, 6)}, r"expected a kernel_size of \[5, 7, .*19\], got 6"),
        ({"small_kernel": 7}, "expected odd kernels, small_kernel at most kernel_size, got 7 and 5"),
        ({"focus_heads": (3, 2)}, "expected dim divisible by 2 .* num_heads, got 32 and 6"),
        ({"out_norm": "dense"}, r"expected out_norm None, .*'detection'\), got 'dense'"),
    ],
    "test_pvt": [
        ({"output_stride": 64}, "expected output_stride 8, 16 or 32, got 64"),
        (
            {"attention_depths": (1, 2, 1)},
            r"expected attention_depths of 0 to \[1, 2, 1, 2\] per stage, got \[1, 2, 1\]",
        ),
        ({"attention_depths": (1, 3, 1, 2)}, r"per stage, got \[1, 3, 1, 2\]"),
        ({"attention_args": [{}, {}]}, "expected attention_args, a dict or 4 of them, got 2"),
        ({"attention": "performer"}, "expected attention of 'softmax', .* got 'performer'"),
        ({"global_pool": "catavgmax"}, "expected global_pool of '', 'token', .* got 'catavgmax'"),
        ({"depths": (1,), "embed_dims": (24,), "mlp_ratios": (4,)}, "at least 2 stages with a class token, got 1"),
        ({"sr_ratios": (8, 4, 2, 2)}, "expected no prefix tokens with sr_ratio 2"),
    ],
    "test_resnest_va": [
        ({"output_stride": 4}, "expected output_stride 8, 16 or 32, got 4"),
        ({"radix": 3, "cardinality": 1}, r"got 16 channels for radix 3 x cardinality 1.*try a multiple of 12"),
    ],
    "test_resnet_ea": [
        ({"ea_stages": (0,)}, "expected ea_stages of 1 to 4"),
        ({"ea_stages": (5,)}, "expected ea_stages of 1 to 4"),
        ({"ea_stages": (2, 2)}, "expected ea_stages of 1 to 4"),
        ({"ea_key_channels": 5, "ea_heads": 2}, "divisible by head_count"),
    ],
    "test_shiftvit": [
        ({"output_stride": 4}, "expected output_stride 8, 16 or 32, got 4"),
        ({"n_div": 3}, "expected n_div of at least 4, one part for each direction, got 3; try 12"),
    ],
    "test_swin_va": [
        ({"output_stride": -8}, "expected output_stride 8, 16 or 32, got -8"),
        ({"attention": "linear"}, "expected attention of 'softmax', 'agent', .*, got 'linear'"),
        ({"attention_depths": (1, 1)}, r"expected attention_depths of 0 to \[2, 2, 2, 1\] per stage, got \[1, 1\]"),
        ({"attention_depths": (0, 3, 0, 0)}, r"per stage, got \[0, 3, 0, 0\]"),
        ({"attention_args": [{}, {}]}, "expected attention_args, a dict or 4 of them, got 2"),
        ({"window_size": 0}, "expected window_size of one int or two, at least 1, got 0"),
        ({"out_norm": "batch"}, "expected out_norm None or one of"),
    ],
    "test_transnext": [
        ({"output_stride": 4}, "expected output_stride 8, 16 or 32, got 4"),
        ({"position_bias": "linear"}, "expected position_bias 'extrapolate' or 'interpolate', got 'linear'"),
        ({"position_bias": "interpolate"}, "expected bias_img_size with position_bias 'interpolate'"),
        ({"bias_img_size": 512}, "and only then, got 512 with 'extrapolate'"),
        ({"pretrain_size": 63}, "expected pretrain_size of at least 64 .* for 4 stages, got 63"),
        ({"position_bias": "interpolate", "bias_img_size": 31}, "bias_img_size of at least 32 .* got 160 and 31"),
    ],
}
REFUSED = [
    *((name, *row, ValueError) for name, rows in REFUSED_BY_VALUE.items() for row in rows),
    ("biformer_tiny", {"diff_routing": True}, "try soft_routing=True", NotImplementedError),
    ("test_resnet_ea", {"key_channels": 5}, "got .*key_channels", TypeError),
    ("test_convit_va", {"output_stride": 16}, "expected no output_stride for ConViT, .*; try patch_size", TypeError),
    ("test_deit_va", {"output_stride": 8}, "expected no output_stride for DeiT, .*, got 8; try patch_size", TypeError),
    ("test_patchconvnet", {"output_stride": 8}, "expected no output_stride for PatchConvNet, .*, got 8", TypeError),
    (
        "test_dinat_isotropic",
        {"output_stride": 16},
        "expected no output_stride for IsotropicNAT, .*, got 16",
        TypeError,
    ),
]
