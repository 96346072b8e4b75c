"""Recipes and presets: every model has one, they follow from their table, parse, and fit their models."""

import fnmatch
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.layers import DropPath
from timm.models import resolve_model_input_args
from timm.optim import list_optimizers

ROOT = Path(__file__).resolve().parents[2]

import make_recipes  # noqa: E402

from visattn.train.checks import check  # noqa: E402
from visattn.train.config import LAUNCH_ONLY, Config, read_yaml  # noqa: E402

MODELS = make_recipes.models()
PRESETS = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
TABLE = yaml.safe_load(make_recipes.SOURCE.read_text())
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


def recipe_of(name: str) -> Config:
    return read_yaml(make_recipes.RECIPES / f"{name}.yaml")


@pytest.fixture(scope="module")
def rendered():
    return make_recipes.render_all()


def test_files_are_those_of_the_table(rendered):
    on_disk = {path: path.read_text() for path in make_recipes.RECIPES.glob("*.yaml")}
    differ = {path.name for path in on_disk.keys() | rendered.keys() if on_disk.get(path) != rendered.get(path)}
    assert not differ, f"run `python scripts/make_recipes.py`: {sorted(differ)}"
    assert {path.stem for path in rendered} == set(MODELS)
    assert len(MODELS) > 100


def test_check_tells_changed_orphaned_and_missing_files(tmp_path, monkeypatch, capsys, rendered):
    folder = shutil.copytree(make_recipes.RECIPES, tmp_path / "configs")
    monkeypatch.setattr(make_recipes, "ROOT", tmp_path)
    monkeypatch.setattr(make_recipes, "RECIPES", folder)
    monkeypatch.setattr(
        make_recipes, "render_all", lambda: {folder / path.name: text for path, text in rendered.items()}
    )
    assert make_recipes.main(["--check"]) == 0
    (folder / "nat_mini.yaml").write_text("lr: 1.0")
    (folder / "nat_minus.yaml").write_text("")
    (folder / "nat_tiny.yaml").unlink()
    assert make_recipes.main(["--check"]) == 1
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "configs/nat_mini.yaml",
        "configs/nat_tiny.yaml",
        "configs/nat_minus.yaml",
    ]
    assert make_recipes.main([]) == 0
    assert make_recipes.main(["--check"]) == 0
    (folder / "nat_minus.yaml").write_text("")
    assert make_recipes.main(["--check"]) == 1


def test_table_without_an_entry_or_with_an_unknown_option_is_refused():
    with pytest.raises(make_recipes.RecipeError, match="none for nat_mini"):
        make_recipes.find({"recipes": []}, "nat_mini")
    entry = {"models": ["nat_*"], "source": "", "options": {"lrr": 1}}
    with pytest.raises(make_recipes.RecipeError, match="lrr"):
        make_recipes.find({"common": {}, "recipes": [entry]}, "nat_mini")


def test_every_pattern_of_the_table_serves_a_model():
    unused = {(id(entry), key) for entry in TABLE["recipes"] for key in (*entry["models"], *entry.get("sizes", ()))}
    for name in MODELS:
        entry = make_recipes.entry_of(TABLE, name)
        unused -= {(number, key) for number, key in unused if number == id(entry) and make_recipes.matches(name, [key])}
    # Blocks of sizes are shared by recipes, of which not all have InLine models or a 288-pixel one.
    assert {key for _, key in unused} <= {"inline_*", "*_288"}


def test_recipes_are_complete_valid_and_short(rendered):
    for path, text in rendered.items():
        config = read_yaml(path)
        check(config)
        assert set(yaml.safe_load(text)) == set(make_recipes.OPTIONS)
        assert config.model == path.stem
        assert config.opt in list_optimizers()
        lines = text.splitlines()
        assert len(lines) <= 80
        assert max(map(len, lines)) <= 120
        assert f"configs/imagenet/{path.name}" in text
        if config.pretrained or "--weights FILE" in text:
            assert config.epochs <= 30
        make = auto_augment_transform if config.auto_augment == "original" else rand_augment_transform
        if config.auto_augment:
            make(config.auto_augment, {})
    assert not {*LAUNCH_ONLY, "name", "output", "device", "engine"} & set(make_recipes.OPTIONS)


@pytest.mark.parametrize("name", ALL)
def test_models_take_size_and_drop_path_of_their_recipe(name):
    config = recipe_of(name)
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
pvt_large 0.3, swin_small_va 0.3, coatnet_0_va 0.2, coatnet_1_va 0.3, coatnet_2_va 0.5, coatnet_3_va 0.7,
maxvit_tiny_va 0.2, maxvit_small_va 0.3, maxvit_base_va 0.4, maxvit_large_va 0.6, resnest50_va 0.0
"""
PUBLISHED = """
agent_deit_tiny 4096 4e-3, agent_swin_base 512 5e-4, agent_cswin_tiny 1024 1e-3, cswin_tiny 2048 2e-3,
cswin_base 1024 1e-3, transnext_base 1024 1e-3, dinat_large_384 512 5e-5, dinat_large_21k 512 5e-5,
focused_cswin_tiny 2048 2e-3, focused_pvt_large 256 2.5e-4, maxvit_tiny_va 4096 3e-3, resnest50_va 8192 3.2
"""


def table(text: str) -> list[list[str]]:
    return [item.split() for item in text.replace("\n", ",").split(",") if item.strip()]


def test_drop_path_batch_and_rate_are_the_published_ones():
    for name, rate in table(PUBLISHED_DROP_PATH):
        assert recipe_of(name).drop_path == float(rate), name
    for name, batch, rate in table(PUBLISHED):
        assert (recipe_of(name).batch_size, recipe_of(name).lr) == (int(batch), float(rate)), name


def test_repeated_augmentation_averages_and_squashed_test_images_are_where_the_sources_have_them():
    recipes = {name: recipe_of(name) for name in MODELS}
    repeated = {name.split("_")[0] for name, config in recipes.items() if config.aug_repeats == 3}
    assert repeated == {"biformer", "transnext", "deit", "pvt", "efficient", "halonet26t", "halonet50ts"}
    assert {recipes[f"{host}_cswin_base"].ema_decay for host in ("agent", "focused")} == {0.99992, 0.99982}
    assert (recipes["maxvit_base_va"].ema_decay, recipes["biformer_base"].ema_decay) == (0.9999, 0.99996)
    assert not any(recipes[name].ema_decay for name in ("transnext_base", "nat_base", "swin_base_va", "coatnet_0_va"))
    squashed = {name for name, config in recipes.items() if config.crop_mode == "squash"} - {"maxvit_xlarge_va"}
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
    patterns = read_yaml(ROOT / "configs" / "finetune" / "linear_probe.yaml").train_only
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
        body = {key for key, _ in timm.create_model(name, num_classes=0).named_parameters() if "head" not in key}
    kept = {key for key, _ in model.named_parameters() if any(fnmatch.fnmatch(key, pattern) for pattern in patterns)}
    heads = model.get_classifier()
    weights = {id(parameter) for parameter in heads.parameters()}
    assert weights <= {id(parameter) for key, parameter in model.named_parameters() if key in kept}
    assert not kept & body
