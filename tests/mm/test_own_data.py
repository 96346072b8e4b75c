"""The configs that visattn/mm/README.md shows, for data of one's own, on the nuclei."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope

from tests.mm.conftest import ROOT

README = (ROOT / "visattn" / "mm" / "README.md").read_text()
EXAMPLES = dict(re.findall(r"^```python\n# (nuclei_\w+)\.py\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", ["nuclei_detector", "nuclei_segmentor"])
def test_a_config_for_ones_own_data(name, nuclei, tmp_path):
    text = EXAMPLES[name].replace('"configs/', f'"{ROOT}/configs/').replace('"data/', f'"{nuclei}/')
    (tmp_path / "own.py").write_text(text)
    config = Config.fromfile(tmp_path / "own.py")
    config.model.backbone.update(model_name="test_dinat", drop_path_rate=0.0, pretrained=False)
    config.model.backbone.pop("dilations", None)
    channels = [20, 40, 80, 160]
    with DefaultScope.overwrite_default_scope(config.default_scope):
        if name == "nuclei_detector":
            config.model.neck.in_channels = channels
        else:
            config.model.decode_head.in_channels = channels
            config.model.auxiliary_head.in_channels = channels[2]
        model = MODELS.build(config.model)
        data = {split: DATASETS.build(config[f"{split}_dataloader"].dataset) for split in ("train", "val", "test")}
        evaluator = METRICS.build(config.val_evaluator)
    assert [len(data[split]) for split in ("train", "val", "test")] == [35, 4, 4]
    assert data["train"].metainfo["classes"] == data["val"].metainfo["classes"]
    heads = [module for key, module in model.named_modules() if not key.startswith("backbone")]
    numbers = {head.num_classes for head in heads if hasattr(head, "num_classes")}
    assert numbers == {len(data["train"].metainfo["classes"])}
    evaluator.dataset_meta = data["val"].metainfo
    batch = model.data_preprocessor(pseudo_collate([data["train"][i] for i in (0, 1)]), training=True)
    losses = model(**batch, mode="loss")
    assert torch.isfinite(losses["loss_mask" if name == "nuclei_detector" else "decode.loss_ce"])
    model.eval()
    with torch.no_grad():
        samples = model.test_step(pseudo_collate([data["val"][0]]))
    evaluator.process({}, [sample.to_dict() for sample in samples])
    assert any("mAP" in key or "mIoU" in key for key in evaluator.evaluate(1))
