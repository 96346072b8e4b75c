"""ONNX Runtime: static int8 quantisation of an exported network."""

import numpy as np
import pytest
import timm
import torch

from tests.tolerances import SAME_MODEL, relative_error

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
quantization = pytest.importorskip("onnxruntime.quantization")
from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NAME, SIZE = "test_resnest_va", (2, 3, 96, 128)


class Images(quantization.CalibrationDataReader):
    """Some to measure the range of activations on."""

    def __init__(self, number=8):
        self.images = iter([{"x": torch.randn(SIZE).numpy()} for _ in range(number)])

    def get_next(self):
        return next(self.images, None)


def run(path, image):
    (logits,) = ort.InferenceSession(path).run(None, {"x": image.numpy()})
    return torch.from_numpy(np.asarray(logits))


@torch.no_grad()
def test_static_int8(works, tmp_path):
    model, image = timm.create_model(NAME).eval().requires_grad_(False), torch.randn(SIZE)
    plain, prepared, int8 = (str(tmp_path / f"{name}.onnx") for name in ("plain", "prepared", "int8"))
    torch.onnx.export(model, (image,), dynamo=True, verbose=False).save(plain)
    expected = model(image)
    assert relative_error(run(plain, image), expected) <= SAME_MODEL
    quant_pre_process(plain, prepared)
    kind = quantization.QuantType.QInt8
    quantization.quantize_static(prepared, int8, Images(), per_channel=True, weight_type=kind, activation_type=kind)
    error = relative_error(run(int8, image), expected)
    assert 0 < error <= 0.05
    share = (tmp_path / "int8.onnx").stat().st_size / (tmp_path / "plain.onnx").stat().st_size
    assert share < 0.5
    works("onnxruntime", "quantize_static, int8", f"`{NAME}`: logits within {error:.1%}, file {share:.0%}")
