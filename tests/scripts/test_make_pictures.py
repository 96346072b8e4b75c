"""The picture of attentions shows what the ops compute."""

from functools import partial

import make_pictures
import torch

from visattn.ops import neighborhood_attention, window_attention


def test_a_query_sees_its_keys():
    q = torch.randn(1, make_pictures.TOKENS, make_pictures.TOKENS, 1, 2, dtype=torch.float64)
    row, column = make_pictures.QUERY
    seen = make_pictures.seen(partial(neighborhood_attention, q, q, kernel_size=7))
    assert seen.sum() == 49
    assert seen[row - 3 : row + 4, column - 3 : column + 4].all()
    grid = make_pictures.seen(partial(window_attention, q, q, window_size=7, grid=True))
    assert grid.sum() == 49
    assert grid[row % 6 :: 6, column % 6 :: 6].all()


def test_the_picture_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_pictures, "ASSETS", tmp_path)
    make_pictures.main(["--only", "attention"])
    assert (tmp_path / "attention.png").stat().st_size > 1e5
    assert "attention.png: 1280 x 704" in capsys.readouterr().out
