"""Lightning: a fit of 20 steps."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visattn  # noqa: F401
from tests.works_with.tasks import CLASSES, bars, check_fall

lightning = pytest.importorskip("lightning")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Classifier(lightning.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(name, num_classes=CLASSES)
        self.losses = []

    def training_step(self, batch, index):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 2e-3)


@pytest.mark.parametrize("name", ["dinat_atto", "test_swin_va"])
def test_fit(works, name, tmp_path):
    """And the checkpoint it leaves, read back."""
    module = Classifier(name)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*bars(64)), 16, shuffle=True)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", max_steps=20, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, loader)
    assert trainer.global_step == 20
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(image), module.eval().model(image))
    works("lightning", f"Trainer.fit of `{name}`, checkpoint read back", check_fall(module.losses))
