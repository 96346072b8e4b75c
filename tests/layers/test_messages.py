"""Messages hold a user's value in short, however large it is written out."""

import pytest

from visattn import layers
from visattn.layers.create import create_token_mixer
from visattn.layers.pool import create_pool
from visattn.ops.checks import per_axis

LARGE = ("x",) * 9
for _ in range(5):
    LARGE = (LARGE,) * 9  # half a million words, of which memory holds nine


@pytest.mark.parametrize(
    "refuse",
    [
        lambda: create_token_mixer(LARGE, 8, 1, (4, 4)),
        lambda: create_token_mixer("inline", 8, 1, (4, 4), kernel_func=LARGE),
        lambda: create_pool(LARGE),
        lambda: per_axis("kernel_size", LARGE, int, 2),
        lambda: layers.BiLevelRoutingAttention(8, padding=LARGE),
        lambda: layers.BiLevelRoutingAttention(8, kv_downsample_mode=LARGE),
    ],
)
def test_large_values_are_shortened(refuse):
    with pytest.raises((ValueError, RuntimeError), match="expected ") as caught:
        refuse()
    assert len(str(caught.value)) < 400
