"""Class attention: against its formulas, with and without class tokens among the keys; what it tells of itself."""

import pytest
import torch
import torch.nn.functional as F

from tests.layers.checks import *  # noqa: F403
from tests.tolerances import OP, relative_error
from visattn.layers import ClassAttention, ClassAttentionBlock
