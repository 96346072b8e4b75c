"""What a run takes from other models: their weights (--weights, --train-only) and their answers (--kd-model)."""

import pytest
import timm
import torch
from runs import PLAIN, SMALL, assert_same_tensors, build, column, slow, stop_after_first_epoch, tensors
from safetensors.torch import load_file, save_file
from torch.nn import functional

import visattn  # noqa: F401
from visattn.train import distributed
from visattn.train import run as trainer
from visattn.train.errors import CheckpointError
from visattn.train.weights import load_into


def save_model(path, name, classes=2, **options):
    torch.manual_seed(5)
    save_file(timm.create_model(name, num_classes=classes, **options).state_dict(), path)
    return path


STUDENTS = [("logit", "test_vit"), ("feature", "test_vit"), slow("token", "deit_tiny_distilled_patch16_224")]


@pytest.mark.parametrize(("kind", "student"), STUDENTS)
def test_distillation_adds_its_weighted_loss(folder_data, run, tmp_path, kind, student):
    """From one start, the first loss is linear in the weight of the teacher."""
    teacher = ("--kd-model", "test_resnet", "--kd-weights", save_model(tmp_path / "t.safetensors", "test_resnet"))
    options = ("--data", folder_data, *PLAIN, "--epochs", 1)
    losses = [
        column(run(f"w{w}", *options, *teacher, "--kd-type", kind, "--kd-weight", w, model=student)[1], "train_loss")[0]
        for w in (0, 1, 2)
    ]
    assert losses[1] > losses[0] + 1e-3
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)
    if kind != "token":  # whose student has two heads in this case only
        _, alone = run("alone", *options, model=student)
        assert column(alone, "train_loss")[0] == pytest.approx(losses[0], rel=1e-6)


def test_logits_are_imitated_at_a_temperature(folder_data, tmp_path):
    teacher = ("--kd-model", "test_resnet", "--kd-weights", save_model(tmp_path / "t.safetensors", "test_resnet"))
    options = ("--data", folder_data, *PLAIN, "--epochs", 1, "--kd-temperature", 3, "--kd-weight", 0.5)
    built = build("--model", "test_vit", *options, *teacher, "--output", tmp_path)
    built.state.task.teacher.model.fc.weight.data *= 100  # of small logits any temperature makes the same
    images, target = next(built.engine.loaders.begin(0, 0))
    mine, wanted = (model(images) / 3 for model in (built.engine.model, built.state.task.teacher))
    gap = functional.kl_div(mine.log_softmax(1), wanted.softmax(1), reduction="batchmean")
    labels = functional.cross_entropy(3 * mine, target, label_smoothing=0.1)
    torch.testing.assert_close(built.state.task(images, target)["loss"], labels + 0.5 * 9 * gap)


@pytest.mark.parametrize("kind", [slow("logit"), "feature"])
def test_distillation_goes_on_and_leaves_the_teacher_alone(folder_data, run, tmp_path, kind):
    weights = save_model(tmp_path / "t.safetensors", "test_resnet")
    options = ("--data", folder_data, *PLAIN, "--kd-model", "test_resnet", "--kd-weights", weights)
    options += ("--kd-type", kind, "--epochs", 3, "--ema-decay", 0.5)
    built = build(*options, "--model", "test_vit", "--output", tmp_path / "out", "--name", "whole")
    before = {key: value.clone() for key, value in built.state.task.teacher.model.state_dict().items()}
    trainer.train(built)
    after = built.state.task.teacher.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(p.requires_grad for p in built.state.task.teacher.parameters())

    whole, parts = tmp_path / "out" / "whole", tmp_path / "out" / "parts"
    assert load_file(whole / "model_ema.safetensors").keys() == load_file(whole / "model.safetensors").keys()
    timm.create_model("test_vit", num_classes=2, img_size=32, checkpoint_path=whole / "model.safetensors")
    stop_after_first_epoch(whole, parts)
    assert run("parts", "--resume", parts)[0] == 0
    assert_same_tensors(whole, parts)
    assert any("projection" in key for key in tensors(whole)) == (kind == "feature")


@pytest.mark.parametrize(
    ("kind", "engine"), [("feature", "fsdp2"), slow("logit", "ddp"), slow("feature", "ddp"), slow("logit", "fsdp2")]
)
def test_two_processes_distil_like_one(folder_data, run, launch, tmp_path, kind, engine):
    weights = save_model(tmp_path / "t.safetensors", "test_resnet")
    options = ("--data", folder_data, *PLAIN, "--kd-model", "test_resnet", "--kd-weights", weights)
    options += ("--kd-type", kind, "--epochs", 3, "--ema-decay", 0.5)
    _, one = run("one", *options)
    processes = launch(*options, "--engine", engine, "--name", "two", size=2)
    assert processes.wait() == [0, 0], processes.output()
    for key in ("train_loss", "eval_loss", "ema_loss"):
        assert column(tmp_path / "out" / "two", key) == pytest.approx(column(one, key), rel=1e-5), key


def test_teachers_that_cannot_teach_are_refused(refused, tmp_path):
    teacher = ("--kd-model", "test_resnet", "--kd-weights")
    good, ten = (save_model(tmp_path / f"{n}.safetensors", "test_resnet", n) for n in (2, 10))
    assert "does not have 'set_distilled_training'" in refused(*teacher, good, "--kd-type", "token")
    assert "a head for others" in refused(*teacher, ten)
    assert "got no file" in refused(*teacher, tmp_path / "none.safetensors")
    assert "expected weights of this model" in refused("--kd-model", "test_convnext", "--kd-weights", good)
    assert "--kd-model: expected the published weights of test_dinat" in refused("--kd-model", "test_dinat")  # none


@pytest.mark.parametrize(("size", "engine"), [(1, "ddp"), (2, "ddp"), (2, "fsdp2")])
def test_train_only_leaves_the_rest_as_it_is(folder_data, launch, tmp_path, size, engine):
    start = save_model(tmp_path / "start.safetensors", "test_resnet")
    options = ("--data", folder_data, *SMALL, "--batch-size", 6, "--epochs", 1, "--weights", start, "--engine", engine)
    options += ("--train-only", "fc.*", "--name", "r")
    processes = launch(*options, "--weight-decay", 0.5, size=size, model="test_resnet")
    assert set(processes.wait()) == {0}, processes.output()
    before, after = load_file(start), load_file(tmp_path / "out" / "r" / "model.safetensors")
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"fc.weight", "fc.bias"}
    assert any("running_mean" in key for key in before)


def test_frozen_statistics_are_not_averaged(monkeypatch):
    """Five and more processes could round their mean to other values."""
    monkeypatch.setattr(distributed.dist, "all_reduce", torch.Tensor.zero_)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2).eval())
    distributed.World(0, 5, torch.device("cpu")).average_batch_norm(model)
    assert [norm.running_var.tolist() for norm in model] == [[0, 0], [1, 1]]


def test_train_only_goes_on_and_names_what_it_does_not_find(folder_data, run, refused):
    """Without weight decay all parameters are in one group, the frozen ones too."""
    options = ("--data", folder_data, *SMALL, "--epochs", 2, "--train-only", "fc.*", "--weight-decay", 0)
    code, whole = run("whole", *options, model="test_resnet")
    assert code == 0
    stop_after_first_epoch(whole, whole.with_name("parts"))
    assert run("parts", "--resume", whole.with_name("parts"))[0] == 0
    assert_same_tensors(whole, whole.with_name("parts"))
    assert "try the ends of head.weight, head.bias" in refused("--train-only", "fc.*")


def test_weights_from_files(folder_data, run, tmp_path, capsys):
    same = save_model(tmp_path / "same.safetensors", "test_swin_va")
    torch.save({"model": load_file(same)}, tmp_path / "same.pth")
    official = {key.replace("head.fc.", "head."): value for key, value in load_file(same).items()}
    torch.save({"model": official}, tmp_path / "official.pth")
    head = save_model(tmp_path / "head.safetensors", "test_swin_va", 10)
    still = ("--data", folder_data, *PLAIN, "--epochs", 1, "--opt", "sgd", "--lr", 1e-30, "--min-lr", 0)
    for path in (same, tmp_path / "same.pth", tmp_path / "official.pth", head):
        code, folder = run(path.name, *still, "--warmup-lr", 0, "--weights", path, model="test_swin_va")
        said = capsys.readouterr()
        assert code == 0, said.err
        got, given = load_file(folder / "model.safetensors"), load_file(path if path == head else same)
        others = {key for key, value in given.items() if got[key].shape != value.shape}
        assert all(torch.allclose(got[key], given[key], rtol=0, atol=1e-20) for key in given.keys() - others)
        assert others == ({"head.fc.weight", "head.fc.bias"} if path == head else set())
        assert ("left out head.fc." in said.out) == (path == head)


UNFIT = {
    "unknown": (lambda s: {**s, "one_more": torch.ones(1)}, r"adds \['one_more'\]"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "bn1.weight"}, r"lacks \['bn1.weight'\]"),
    "shape": (lambda s: {**s, "bn1.weight": torch.ones(1)}, "size mismatch at bn1.weight"),
    "integers": (lambda s: {**s, "fc.bias": s["fc.bias"].long()}, "fc.bias of int64 in place of float32"),
    "bool": (lambda s: {**s, "fc.bias": s["fc.bias"] > 0}, "fc.bias of bool in place of float32"),
    "complex": (lambda s: {**s, "fc.bias": s["fc.bias"] + 1j}, "fc.bias of complex64 in place of float32"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_of_timms_changes_only_if_everything_fits(tmp_path, kind):
    model = timm.create_model("test_resnet", num_classes=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    change, message = UNFIT[kind]
    torch.save(change({key: value + 1 for key, value in before.items()}), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"expected weights of this model, got .*w.pth, .*{message}.*; try"):
        load_into(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_values_that_are_not_finite_are_told(tmp_path):
    model = timm.create_model("test_resnet", num_classes=2)
    torch.save({**model.state_dict(), "fc.bias": torch.tensor([1, float("nan")])}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"NaN or infinity in .*w.pth: tensors 1, the first fc.bias \(1 of 2 values\)"):
        assert load_into(model, tmp_path / "w.pth") == []


@pytest.mark.parametrize("other", ["test_resnet", "test_dinat"])
@pytest.mark.parametrize("model", ["test_vit", "test_swin_va", "test_maxvit_va"])
def test_weights_of_another_model_are_refused(refused, tmp_path, model, other):
    said = refused("--weights", save_model(tmp_path / "w.safetensors", other), model=model)
    assert "expected weights of this model" in said
