"""The maker of the leaves of configs/detection and configs/segmentation; what it writes is tested in tests/mm."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

import make_cards  # noqa: E402
import make_mm_configs  # noqa: E402

RECIPE = {
    "file": "detection/mask_rcnn_{model}_fpn_1x_coco",
    "bases": ["mask_rcnn", "coco", "schedule_1x"],
    "source": "here",
    "backbone": {"out_norm": "layer"},
    "optimizer": {"lr": 1e-4},
    "models": {"test_dinat": {"also": {"optim_wrapper": {"optimizer": {"lr": 0.5}}}}},
}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Writes a table of recipes and points the tool, without cards, at it and at an empty folder of configs."""
    monkeypatch.setattr(make_mm_configs, "SOURCE", tmp_path / "table.yaml")
    monkeypatch.setattr(make_mm_configs, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(make_mm_configs, "ROOT", tmp_path)
    for folder in ("detection", "segmentation"):
        (tmp_path / "configs" / folder).mkdir(parents=True)

    def write(*recipes):
        content = yaml.safe_dump({"sources": {"here": "Somewhere"}, "recipes": list(recipes)})
        (tmp_path / "table.yaml").write_text(content)
        return tmp_path / "configs" / "detection"

    return write


def test_a_leaf_has_the_models_channels_and_the_entrys_own_values(table):
    folder = table(RECIPE)
    assert make_mm_configs.main([]) == 0
    text = (folder / "mask_rcnn_test-dinat_fpn_1x_coco.py").read_text()
    channels = make_mm_configs.channels("test_dinat")
    assert f"neck=dict(in_channels={channels})" in text
    assert "optim_wrapper = dict(optimizer=dict(lr=0.5))" in text
    assert '"_base_/schedule_1x.py", "_base_/runtime.py"]' in text
    assert "# Settings of Somewhere. " in text
    assert "pretrained" not in text  # there are no weights


def test_check_finds_edited_missing_and_left_over_files(table, capsys):
    folder = table(RECIPE)
    assert make_mm_configs.main(["--check"]) == 1
    assert make_mm_configs.main([]) == 0
    assert make_mm_configs.main(["--check"]) == 0
    (folder / "old.py").write_text("")
    assert make_mm_configs.main(["--check"]) == 1
    assert "old.py: differs" in capsys.readouterr().err
    assert make_mm_configs.main([]) == 0
    assert not (folder / "old.py").exists()
    next(folder.glob("*.py")).write_text("model = 1\n")
    assert make_mm_configs.main(["--check"]) == 1


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ([{**RECIPE, "lr": 1}], r"expected keys of .*, got \['lr'\]"),
        ([RECIPE, RECIPE], "expected one recipe for detection/mask_rcnn_test-dinat_fpn_1x_coco.py, got two"),
    ],
)
def test_what_is_wrong_in_the_table_is_said(table, recipes, message):
    table(*recipes)
    with pytest.raises(make_mm_configs.RecipeError, match=message):
        make_mm_configs.render_all()


def test_a_config_of_a_card_without_recipe_is_said(table, monkeypatch):
    table(RECIPE)
    monkeypatch.setattr(make_mm_configs, "published_numbers", lambda: {"detection/other.py": "box AP 1"})
    with pytest.raises(make_mm_configs.RecipeError, match=r"got none for \['detection/other.py'\]"):
        make_mm_configs.render_all()


def test_code_of_the_table_is_written_and_never_run(table):
    folder = table(RECIPE)
    path = make_mm_configs.SOURCE
    path.write_text(path.read_text().replace("out_norm: layer", "out_norm: !python __import__('os').getcwd()"))
    assert make_mm_configs.main([]) == 0
    assert "out_norm=__import__('os').getcwd()" in next(folder.glob("*.py")).read_text()


def test_tags_that_make_objects_are_refused(table):
    table(RECIPE)
    path = make_mm_configs.SOURCE
    path.write_text(path.read_text().replace("out_norm: layer", "out_norm: !!python/object/apply:os.getcwd []"))
    with pytest.raises(yaml.constructor.ConstructorError):
        make_mm_configs.render_all()


def test_numbers_come_from_the_row_that_names_the_config():
    numbers = make_mm_configs.published_numbers()
    config = "detection/mask_rcnn_agent-swin-tiny_fpn_3x_coco.py"
    assert numbers[config] == "Official, not reproduced here: box AP 47.3, mask AP 42.7 (model_cards/swin_va.md)."
    dino = numbers["detection/dino_5scale_transnext-tiny_12e_coco.py"]
    assert dino == "Official, not reproduced here: box AP 55.7 (model_cards/transnext.md)."
    assert "mIoU 45.62" in numbers["segmentation/fcn_resnest101-va_160k_ade20k.py"]  # FCN in the card


def test_a_card_names_configs_that_are_there(tmp_path, monkeypatch):
    card = make_cards.load(ROOT / "model_cards" / "biformer.yaml")
    row = card.results[0].rows[0]
    assert make_cards.config_of(card.results[0], row) == "detection/mask_rcnn_biformer-small_fpn_1x_coco.py"
    link = "[mask_rcnn_biformer-small_fpn_1x_coco](../configs/detection/mask_rcnn_biformer-small_fpn_1x_coco.py)"
    assert link in make_cards.render(card)
    monkeypatch.setattr(make_cards, "check_models", lambda card, only=None: [])
    path = ROOT / "model_cards" / "biformer.yaml"
    assert make_cards.check(path) == []
    monkeypatch.setattr(make_cards, "CONFIGS", tmp_path)
    assert f"configs/{make_cards.config_of(card.results[0], row)}: named, but not there" in make_cards.check(path)
