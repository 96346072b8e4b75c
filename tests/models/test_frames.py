"""How far it is from a model to PyTorch's attention: the functions of this package in between."""

import importlib
import sys
from pathlib import Path

import pytest
import timm
import torch

import visattn

PACKAGE = str(Path(visattn.__file__).parent)
MODELS = {"test_dinat": "neighborhood", "test_swin_va": "window", "test_maxvit_va": "window"}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_from_model_to_attention_are_six_frames_in_five_files(name, monkeypatch):
    functional = importlib.import_module(f"visattn.ops.{MODELS[name]}.eager").F
    attend, paths = functional.scaled_dot_product_attention, []

    def walk(*args, **kwargs):
        frame, path = sys._getframe(1), []
        while frame is not None:
            code = frame.f_code
            path += [(code.co_filename, code.co_name)] if code.co_filename.startswith(PACKAGE) else []
            frame = frame.f_back
        paths.append(path[::-1])
        return attend(*args, **kwargs)

    model = timm.create_model(name).eval()
    monkeypatch.setattr(functional, "scaled_dot_product_attention", walk)
    model(torch.randn(1, 3, 64, 64))
    assert paths
    for path in paths:
        print("\n".join(f"{file.removeprefix(PACKAGE)}: {function}" for file, function in path), end="\n\n")
        assert len(path) <= 6
        assert len({file for file, _ in path}) <= 5
