"""Budgets of memory as users write them."""

from __future__ import annotations

import pytest

from wanx.errors import UsageError
from wanx.memory_size import parse_budget


@pytest.mark.parametrize(
    ("text", "size"),
    [("12G", 12 << 30), ("512m", 512 << 20), ("12884901888", 12 << 30), (" 1G ", 1 << 30)],
)
def test_budgets(text: str, size: int) -> None:
    assert parse_budget("--memory", text) == size


@pytest.mark.parametrize("text", ["12", "", "G", "0G", "-1G", "1.5G", "12GB", "12 G", "1e9", "٣G"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--memory .* is not a size; give one such as 12G"):
        parse_budget("--memory", text)
