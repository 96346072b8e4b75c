"""The picture of speeds shows the committed results."""

import json

import plot_peers
import pytest
from PIL import Image


@pytest.fixture
def record():
    return json.loads(plot_peers.RESULTS.read_text())


def test_the_picture_is_up_to_date(record):
    drawn = Image.open(plot_peers.PICTURE).info["Description"]
    assert drawn == plot_peers.described(plot_peers.factors(record)), "run python benchmarks/plot_peers.py"


def test_the_fastest_of_the_others_is_the_peer(record, tmp_path):
    slow = {"provider": "slow", "case": "window_56", "mode": "forward", "median_ms": 1e9}
    fast = slow | {"provider": "fast", "median_ms": 1e-3}
    record["results"] += [slow, fast, fast | {"provider": "refused", "median_ms": None}]
    peer, factor = plot_peers.factors(record)["window_56"]["forward"]
    assert peer == "fast"
    assert 0 < factor < 1
    plot_peers.draw(record, tmp_path / "speed.png")
    assert "window_56 forward: 0.00 x fast" in Image.open(tmp_path / "speed.png").info["Description"]
