"""The configs for data of one's own run, as they are on the nuclei, and with another backbone by its name alone."""

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope

from tests.mm.conftest import ROOT
from visattn.mm import fit_channels


@pytest.mark.parametrize("file", ["detection/own_coco.py", "segmentation/own_masks.py"])
@pytest.mark.parametrize("model_name", [None, "test_dinat"])
def test_a_config_for_ones_own_data(file, model_name, nuclei, tmp_path):
    text = (ROOT / "configs" / file).read_text().replace('"data/', f'"{nuclei}/')
    text = text.replace('"_base_/', f'"{ROOT}/configs/{file.partition("/")[0]}/_base_/')
    if model_name:
        text = text.replace('model_name = "dinat_mini"', f'model_name = "{model_name}"')
    (tmp_path / "own.py").write_text(text)
    config = Config.fromfile(tmp_path / "own.py")
    if model_name:
        fit_channels(config.model)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
        data = {split: DATASETS.build(config[f"{split}_dataloader"].dataset) for split in ("train", "val", "test")}
        evaluator = METRICS.build(config.val_evaluator)
    assert [len(data[split]) for split in ("train", "val", "test")] == [35, 4, 4]
    assert data["train"].metainfo["classes"] == data["val"].metainfo["classes"] == config.classes
    heads = [module for key, module in model.named_modules() if not key.startswith("backbone")]
    assert {head.num_classes for head in heads if hasattr(head, "num_classes")} == {len(config.classes)}
    if not model_name:  # large: built is enough
        return
    evaluator.dataset_meta = data["val"].metainfo
    batch = model.data_preprocessor(pseudo_collate([data["train"][i] for i in (0, 1)]), training=True)
    losses = model(**batch, mode="loss")
    assert torch.isfinite(losses["loss_mask" if file.startswith("detection") else "decode.loss_ce"])
    model.eval()
    with torch.no_grad():
        samples = model.test_step(pseudo_collate([data["val"][0]]))
    evaluator.process({}, [sample.to_dict() for sample in samples])
    assert any("mAP" in key or "mIoU" in key for key in evaluator.evaluate(1))
