"""What every family owes to the official code and to its users: outputs, counts, files, sizes, attentions, refusals."""

import pytest
import timm
import torch

import visattn  # noqa: F401
from tests.models import golden as goldens
from tests.models.cases import (
    ATROUS,
    CLASSIFIERS,
    DILATED,
    EXTRACTORS,
    FILES,
    GOLDENS,
    MIXED,
    NATIVE,
    PARAMETERS,
    PUBLISHED,
    REFUSED,
    STRIDED,
    TAGS,
)
from tests.tolerances import SAME_MODEL, relative_error
from visattn.layers import TOKEN_MIXERS

TOLD = ("num_classes", "input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "license")


@pytest.mark.parametrize("case", GOLDENS, ids=str)
def test_golden(case):
    golden = goldens.load(case.file)
    model = timm.create_model(case.name, **case.args).eval()
    number = 0
    for weights, inputs in goldens.passes(golden):
        goldens.load_official(getattr(model, "model", model), golden, weights)
        for given in inputs:
            goldens.check_case(model, given, case.run)
            number += 1
    assert number == case.inputs


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_official_ones(name):
    assert goldens.number_of_parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    """In millions; the tables of CoAtNet's paper sum up differently in themselves, see the model's file."""
    assert goldens.number_of_parameters(name) / 1e6 == PUBLISHED[name]


@pytest.mark.parametrize("name", TAGS)
def test_tags_are_timms(name):
    """All of timm's, with what it says of them."""
    ours = [timm.get_pretrained_cfg(n) for n in timm.list_models(name, include_tags=True)]
    ours = {cfg.hf_hub_id.removeprefix("timm/"): cfg for cfg in ours if cfg.hf_hub_id}
    theirs = [n for n in timm.list_models(TAGS[name], include_tags=True, pretrained=True) if "_va" not in n]
    assert ours.keys() == set(theirs)
    for tag, cfg in ours.items():
        other = timm.get_pretrained_cfg(tag)
        assert cfg.hf_hub_id == other.hf_hub_id
        assert {key: getattr(cfg, key) for key in TOLD} == {key: getattr(other, key) for key in TOLD}, tag
        assert cfg.pool_size == (other.pool_size and tuple(n // 32 for n in cfg.input_size[1:])), tag


@pytest.mark.parametrize("name", NATIVE)
def test_filter_passes_native_keys(name):
    goldens.check_native_keys_pass(name)


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_official_checkpoint_file_loads_as_pretrained(case, tmp_path):
    """The whole way of `pretrained=True`, from a file of the official layout, also for grey images and 5 classes."""
    golden = goldens.load(case.golden)
    weights = goldens.official_weights(golden)
    torch.save({case.wrapper: weights} if case.wrapper else weights, tmp_path / "weights.pth")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    model = timm.create_model(case.name, **args).eval()
    goldens.check_case(model, golden, case.run)

    other = timm.create_model(case.name, in_chans=1, num_classes=5, **case.args, **args)
    own, theirs = model.state_dict(), other.state_dict()
    first = f"{case.first}.weight"
    torch.testing.assert_close(theirs[first], own[first].sum(1, keepdim=True))
    assert torch.equal(theirs[case.kept], own[case.kept])
    assert other.get_classifier().out_features == 5
    assert {key: tuple(theirs[key].shape) for key in case.shapes} == case.shapes


@torch.inference_mode()
@pytest.mark.parametrize("case", EXTRACTORS, ids=str)
def test_any_input_size(case):
    """One model after another size, with none of them told to it."""
    model = timm.create_model(case.name, features_only=True, **case.args)
    assert model.feature_info.reduction() == list(case.strides)
    parameters = list(model.parameters())
    for size in (*case.sizes, *case.more):
        goldens.check_levels(model, torch.randn(1, case.args.get("in_chans", 3), *size), case.number)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("case", CLASSIFIERS, ids=str)
def test_classifiers_at_any_input_size(case):
    """What is computed for one size changes nothing at another."""
    model = timm.create_model(case.name, **case.args).eval()
    first, *others = (torch.randn(1, 3, *size) for size in (*case.sizes, *case.more))
    expected = model(first)
    for image in others:
        assert model(image).isfinite().all(), image.shape
    assert expected.isfinite().all()
    assert not others or torch.equal(model(first), expected)


@torch.no_grad()
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_output_stride(case):
    """The same parameters; maps as told, which change where strides were left out, and with 32 nowhere."""
    plain = timm.create_model(case.name, **case.args).eval()
    image = torch.randn(1, 3, 97, 131)
    expected = plain.forward_intermediates(image, intermediates_only=True)
    for output_stride in (32, 16, 8):
        model = timm.create_model(case.name, output_stride=output_stride, **case.args).eval()
        model.load_state_dict(plain.state_dict())
        strides = [min(level["reduction"], output_stride) for level in plain.feature_info]
        assert [level["reduction"] for level in model.feature_info] == strides
        maps = model.forward_intermediates(image, intermediates_only=True)
        assert [tuple(m.shape[2:]) for m in maps] == [(case.number(97, s), case.number(131, s)) for s in strides]
        for got, want in zip(maps, expected, strict=True):
            assert torch.equal(got, want) == (got.shape == want.shape)
        features = timm.create_model(case.name, features_only=True, output_stride=output_stride, **case.args)
        assert features.feature_info.reduction() == strides[-len(features.feature_info.reduction()) :]


@torch.no_grad()
@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize(("name", "args", "size"), ATROUS, ids=str)
def test_output_stride_computes_the_same_map_at_more_positions(name, args, size, output_stride):
    """Where all is dilated: what is kept of the map is as before, for NAT also where maps are padded."""
    plain, dilated = (timm.create_model(name, output_stride=s, **args).eval() for s in (32, output_stride))
    dilated.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, *size)
    maps = [model.forward_intermediates(image, intermediates_only=True) for model in (plain, dilated)]
    for level, expected, got in zip(plain.feature_info, *maps, strict=True):
        step = max(1, level["reduction"] // output_stride)
        assert relative_error(got[..., ::step, ::step], expected) <= SAME_MODEL


@pytest.mark.parametrize(("name", "args"), DILATED, ids=str)
def test_output_stride_dilates_convolutions(name, args):
    blocks = timm.create_model(name, output_stride=8, device="meta", **args).stages[-1].blocks
    convs = [m for m in blocks.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1)]
    assert {conv.dilation for conv in convs} == {(4, 4)}


@pytest.mark.parametrize("attention", TOKEN_MIXERS)
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_every_attention_trains_at_two_sizes(case, attention):
    more = case.attention_args.get(attention, {})
    model = timm.create_model(case.name, attention=attention, attention_args=more, **case.args)
    mixers = [module.attn for module in model.modules() if hasattr(module, "attn")]
    assert [type(mixer) is TOKEN_MIXERS[attention] for mixer in mixers] == list(map(bool, case.chosen))
    for size in case.sizes:
        model.zero_grad()
        model(torch.randn(2, 3, *size)).square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert all(m.weight.grad.any() for mixer in mixers for m in (mixer.qkv, mixer.proj) if m is not None)


@pytest.mark.parametrize(("name", "args", "message", "error"), REFUSED, ids=str)
def test_arguments_that_do_not_fit(name, args, message, error):
    with pytest.raises(error, match=message):
        timm.create_model(name, **args)
