"""The recorder of learning curves: what it writes, and what it does not take for a curve."""

import json

import learning_curves
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_curve_and_table(tmp_path, monkeypatch):
    """One loss per update and one row per epoch, from the trainer's own log."""
    options = ("--epochs", "2", "--batch-size", "512", "--ema-decay", "0.9", "--warmup-epochs", "1")
    monkeypatch.setattr(learning_curves, "OPTIONS", options)
    monkeypatch.setattr(learning_curves, "GOLDEN", tmp_path / "golden")
    monkeypatch.setattr(learning_curves, "TABLE", tmp_path / "curves.md")
    assert learning_curves.main(["--models", "test_agent_deit"]) == 0
    curve = json.loads((tmp_path / "golden" / "test_agent_deit.json").read_text())
    assert tuple(curve["options"]) == options
    losses = curve["first_losses"]
    assert len(losses) == 4
    assert [sum(losses[:2]) / 2, sum(losses[2:]) / 2] == pytest.approx(curve["train_loss"])
    assert len(curve["eval_loss"]) == len(curve["top1"]) == len(curve["ema_top1"]) == 2
    row = f"| test_agent_deit | digits | 2 | {losses[0]:.3f} | {curve['train_loss'][-1]:.3f} | {curve['top1'][0]:.1f} |"
    assert row in (tmp_path / "curves.md").read_text()


def test_first_updates_only(tmp_path):
    curve = learning_curves.learn("test_agent_deit", tmp_path, ("--batch-size", "256"), updates=3)
    assert len(curve["first_losses"]) == 3
    assert "top1" not in curve


def test_a_failed_run_is_no_curve(tmp_path):
    with pytest.raises(RuntimeError, match="exit code"):
        learning_curves.learn("test_agent_deit", tmp_path, ("--batch-size", "100000"))


def test_models_are_ours():
    """timm's own test models are not."""
    names = learning_curves.models()
    assert {"test_dinat", "test_maxvit_va"} <= set(names)
    assert not {"test_vit", "test_maxvit"} & set(names)
    assert set(learning_curves.MORE_OPTIONS) <= set(names)
