"""The table of number formats by PyTorch's dtype."""

from __future__ import annotations

import torch

from wanx.config import number_formats
from wanx.config.number_formats import NumberFormat

FORMATS: dict[torch.dtype, NumberFormat] = {
    getattr(torch, row.torch): row for row in number_formats.FORMATS
}
