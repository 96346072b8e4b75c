"""What pip and build give to people without a clone."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import visattn
from pathlib import Path
from mmengine.config import Config
assert "dinat_mini" in visattn.list_models("dinat_*", family="nat"), visattn.list_models()
configs = Path(visattn.__file__).parent / "configs"
print(Config.fromfile(configs / "detection" / "mask_rcnn_dinat-mini_fpn_3x_coco.py").model.type)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # an empty environment gets torch
def test_the_wheel_trains_in_an_empty_environment(tmp_path):
    def run(*command, cwd=tmp_path):
        done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", cwd=ROOT).split())
    assert tracked <= packed

    (tmp_path / "empty").mkdir()
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    visattn = python.with_name("visattn")
    assert "dinat_mini " in run(visattn, "list")  # without extras
    failed = subprocess.run([visattn, "train"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert re.fullmatch(
        r"error: expected the package \w+, got none; try pip install 'visattn\[train\]'\n", failed.stderr
    )
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[train]", "mmengine")
    said = run(visattn, "train", "--epochs", 2, "--warmup-epochs", 0, cwd=tmp_path / "empty")
    assert float(re.search(r"test accuracy ([\d.]+) %", said)[1]) > 15
    (trained,) = tmp_path.glob("empty/output/*/model.safetensors")
    assert "0.72 M" in run(visattn, "info", trained.parent)
    assert run(python, "-c", USE, cwd=tmp_path / "empty").strip() == "MaskRCNN"
