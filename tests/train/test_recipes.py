"""Recipes and presets: every model has one, they parse, and fit their models."""

import dataclasses
import fnmatch
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.layers import DropPath
from timm.models import resolve_model_input_args
from timm.optim import list_optimizers

import visattn
from visattn.models import FAMILIES
from visattn.train import files, recipes
from visattn.train.__main__ import main
from visattn.train.arguments import parse
from visattn.train.checks import check
from visattn.train.config import Config
from visattn.train.errors import ConfigError
from visattn.train.recipes import find_recipe, read_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = [name for name in visattn.list_models() if not name.startswith("test_")]
PRESETS = sorted((CONFIGS / "finetune").glob("*.yaml"))
# One model of each family; the rest is built in the slow suite.
SAMPLE = {timm.model_entrypoint(name).__module__: name for name in MODELS}.values()
ALL = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in MODELS]
HEADS = (
    "resnet18",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "densenet121",
    "efficientnet_b0",
    "inception_v4",
    "crossvit_9_240",
)


@pytest.fixture
def family_file(tmp_path, monkeypatch):
    """Writes the file of NAT in a folder of its own."""
    monkeypatch.setattr(recipes, "configs_folder", lambda: tmp_path)
    (tmp_path / "imagenet").mkdir()
    return (tmp_path / "imagenet" / "nat.yaml").write_text


def test_every_family_has_a_file_and_every_pattern_of_it_serves_a_model():
    assert {path.stem for path in (CONFIGS / "imagenet").glob("*.yaml")} == set(FAMILIES)
    for family in FAMILIES:
        text = (CONFIGS / "imagenet" / f"{family}.yaml").read_text()
        assert max(map(len, text.splitlines())) <= 120
        for pattern in yaml.safe_load(text):
            assert fnmatch.filter(visattn.list_models(family=family), pattern), (family, pattern)


def test_every_model_has_a_recipe_that_can_run():
    assert len(MODELS) > 100
    for name in MODELS:
        config = find_recipe(name)
        check(config)
        assert (config.model, config.data) == (name, "imagenet")
        assert config.opt in list_optimizers()
        make = auto_augment_transform if config.auto_augment == "original" else rand_augment_transform
        if config.auto_augment:
            make(config.auto_augment, {})
        if config.pretrained:
            assert config.epochs <= 30


def test_defaults_under_registered_input_under_patterns_under_the_command_line(family_file):
    family_file('{"*": {lr: 0.5, epochs: 7, warmup_epochs: 1}, "*_mini": {lr: 0.25, crop_pct: 0.5}, nat_tiny: {lr: 2}}')
    config = parse(["--recipe", "nat_mini", "--epochs", "9"])
    assert (config.lr, config.epochs, config.crop_pct, config.warmup_epochs) == (0.25, 9, 0.5, 1)
    assert (config.mean, config.img_size, config.in_chans) == ((0.485, 0.456, 0.406), 224, 3)
    assert (config.batch_size, config.data) == (Config.batch_size, Config.data)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--recipe", "dinat_minni"),
            "expected a recipe, named as a model of visattn, got 'dinat_minni'; try dinat_mini",
        ),
        (("--recipe", "dinat_mini.in1k"), "got 'dinat_mini.in1k'; try dinat_mini"),
        (("--recipe", "../secret"), "expected a recipe"),
        (("--recipe", ""), "expected a recipe, named as a model of visattn, got ''; try "),
        (("--recipe", "nat_mini", "--config", "a.yaml"), "expected --recipe or --config, got both; try "),
        (("--recipe", "nat_mini", "--resume", "a"), "expected --recipe or --resume, got both; try "),
        (("--config", str(CONFIGS / "imagenet" / "nat.yaml")), "got unknown key '*'; try --recipe NAME"),
    ],
)
def test_unknown_recipes_and_two_sources_are_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        parse(list(words))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nat_tiny: {lrr: 1}", r"nat.yaml: nat_tiny: expected an option name, got unknown key 'lrr'; try 'lr'"),
        ("nat_tiny: {resume: a}", r"nat_tiny: expected an option name, got unknown key 'resume'"),
        ("nat_tiny: {lr: high}", r"nat.yaml: nat_tiny: lr: expected float, got 'high'; try "),
        ("lr: 1", "nat.yaml: expected options under each pattern, got 1; try "),
        ("[]", "expected `option: value` lines, got a list"),
        ("a: &a {lr: 1}\nb: *a", r"an alias of more than one value"),
    ],
)
def test_mistakes_in_a_family_file_are_said_for_every_model_of_it(family_file, text, message):
    family_file(text)
    with pytest.raises(ConfigError, match=message):
        find_recipe("nat_mini")


def test_old_names_of_models_have_their_recipe():
    assert find_recipe("pvt_tiny_va") == find_recipe("pvt_tiny")


def test_what_print_config_shows_can_be_the_config(tmp_path, capsys):
    words = ["--recipe", "dinat_large_21k_11x11", "--lr", "1e-5"]
    assert main([*words, "--print-config"]) == 0
    shown = tmp_path / "a.yaml"
    shown.write_text(capsys.readouterr().out)
    assert read_yaml(shown) == dataclasses.replace(parse(words), recipe=None)
    assert main(["--config", str(shown), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(shown.read_text())
    assert yaml.safe_load(shown.read_text())["lr"] == 1e-5


def test_configs_are_found_in_an_installed_package_and_in_a_clone(tmp_path, monkeypatch):
    assert files.configs_folder() == CONFIGS
    monkeypatch.setattr(files, "__file__", str(tmp_path / "visattn" / "train" / "files.py"))
    with pytest.raises(ConfigError, match=r"expected the folder of recipes in .*visattn or beside it, got none; try "):
        files.configs_folder()
    for folder in (tmp_path, tmp_path / "visattn"):
        (folder / "configs" / "imagenet").mkdir(parents=True)
        assert files.configs_folder() == folder / "configs"


@pytest.mark.parametrize("name", ALL)
def test_models_take_size_and_drop_path_of_their_recipe(name):
    config = find_recipe(name)
    arguments = resolve_model_input_args(
        name, {"in_chans": config.in_chans, "img_size": config.img_size}, num_classes=1000
    )
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(**arguments).eval()
        assert model(torch.empty(2, 3, config.img_size, config.img_size)).shape == (2, 1000)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates, default=0.0) == pytest.approx(config.drop_path)


PUBLISHED_DROP_PATH = """
biformer_small 0.15, biformer_stl 0.1, nat_mini 0.2, nat_tiny 0.2, nat_small 0.3, nat_base 0.5, dinat_mini 0.2,
dinat_base 0.5, dinat_s_small 0.3, dinat_large 0.35, dinat_s_large_384 0.35, dinat_isotropic_base 0.4,
vitrpb_small 0.1, transnext_micro 0.15, transnext_micro_aaaa 0.15, transnext_tiny 0.25, transnext_small 0.45,
transnext_base 0.6, agent_deit_tiny 0.0, agent_deit_small 0.1, agent_deit_small_448 0.1, agent_deit_base 0.3,
agent_pvt_small 0.1, agent_pvt_medium_256 0.3, agent_pvt_large 0.3, agent_swin_tiny 0.2, agent_swin_small_288 0.3,
agent_swin_base_384 0.5, agent_cswin_small 0.4, agent_cswin_base 0.5, agent_cswin_base_384 0.7, cswin_tiny 0.2,
cswin_base_384 0.7, cswin_large 0.2, focused_pvt_medium 0.3, focused_cswin_small 0.4, deit_base_va 0.1,
l2vit_base 0.3, l2vit_base_384 0.2,
pvt_large 0.3, swin_small_va 0.3, coatnet_0_va 0.2, coatnet_1_va 0.3, coatnet_2_va 0.5, coatnet_3_va 0.7,
convit_small_va 0.1, maxvit_tiny_va 0.2, maxvit_small_va 0.3, maxvit_base_va 0.4, maxvit_large_va 0.6,
overlock_xt 0.1, overlock_t 0.15, overlock_s_reparam 0.4, overlock_b 0.5, resnest50_va 0.0,
shiftvit_light_tiny 0.2, shiftvit_r4_small 0.4, shiftvit_light_base 0.5, shiftvit_r2_base 0.6, flowformer_small 0.2
"""
PUBLISHED = """
agent_deit_tiny 4096 4e-3, agent_swin_base 512 5e-4, agent_cswin_tiny 1024 1e-3, cswin_tiny 2048 2e-3,
cswin_base 1024 1e-3, transnext_base 1024 1e-3, dinat_large_384 512 5e-5, dinat_large_21k 512 5e-5,
l2vit_tiny 4096 4e-3, l2vit_base_384 1024 4e-5, flowformer_small 768 7.5e-4, shiftvit_r2_tiny 1024 1e-3,
focused_cswin_tiny 2048 2e-3, focused_pvt_large 256 2.5e-4, maxvit_tiny_va 4096 3e-3, resnest50_va 8192 3.2,
overlock_xt 2048 2e-3
"""


def table(text: str) -> list[list[str]]:
    return [item.split() for item in text.replace("\n", ",").split(",") if item.strip()]


def test_drop_path_batch_and_rate_are_the_published_ones():
    for name, rate in table(PUBLISHED_DROP_PATH):
        assert find_recipe(name).drop_path == float(rate), name
    for name, batch, rate in table(PUBLISHED):
        assert (find_recipe(name).batch_size, find_recipe(name).lr) == (int(batch), float(rate)), name


def test_repeated_augmentation_averages_and_squashed_test_images_are_where_the_sources_have_them():
    recipes = {name: find_recipe(name) for name in MODELS}
    repeated = {name.split("_")[0] for name, config in recipes.items() if config.aug_repeats == 3}
    halonets = {"halonet26t", "halonet50ts"}
    assert repeated == {"biformer", "convit", "transnext", "deit", "pvt", "efficient", "shiftvit"} | halonets
    assert {recipes[f"{host}_cswin_base"].ema_decay for host in ("agent", "focused")} == {0.99992, 0.99982}
    assert (recipes["maxvit_base_va"].ema_decay, recipes["biformer_base"].ema_decay) == (0.9999, 0.99996)
    assert recipes["shiftvit_r2_base"].ema_decay == 0.99996
    without = ("transnext_base", "nat_base", "swin_base_va", "coatnet_0_va", "convit_small_va")
    assert not any(recipes[name].ema_decay for name in without)
    assert (recipes["flowformer_small"].ema_decay, recipes["flowformer_small"].reprob) == (0, 0)
    squashed = {name for name, config in recipes.items() if config.crop_mode == "squash"}
    squashed -= {"l2vit_base_384", "maxvit_xlarge_va"}
    assert squashed == {name for name in MODELS if name.startswith(("agent_", "inline_", "focused_"))}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_suit_any_model(path):
    config = read_yaml(path)
    check(config)
    assert config.pretrained
    assert not {"model", "data", "mean", "std", "drop_path"} & set(yaml.safe_load(path.read_text()))
    assert f"configs/finetune/{path.name} --model NAME" in path.read_text()


def test_there_are_presets():
    assert {path.stem for path in PRESETS} == {"full", "linear_probe", "higher_resolution"}


@pytest.mark.parametrize("name", [*timm.list_models("test_*", module=""), *HEADS])
def test_linear_probe_trains_the_head_alone(name):
    patterns = read_yaml(CONFIGS / "finetune" / "linear_probe.yaml").train_only
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
        body = {key for key, _ in timm.create_model(name, num_classes=0).named_parameters() if "head" not in key}
    kept = {key for key, _ in model.named_parameters() if any(fnmatch.fnmatch(key, pattern) for pattern in patterns)}
    heads = model.get_classifier()
    weights = {id(parameter) for parameter in heads.parameters()}
    assert weights <= {id(parameter) for key, parameter in model.named_parameters() if key in kept}
    assert not kept & body
