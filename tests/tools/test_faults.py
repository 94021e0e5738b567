"""The page of faults is that of the tests, and the tool notices what is not marked."""

from __future__ import annotations

import faults
import pytest


def test_the_page_is_up_to_date() -> None:
    assert faults.PAGE.read_text(encoding="utf-8") == faults.render()


def test_links_lead_to_tests() -> None:
    marked = list(faults.marked_tests())
    assert len(marked) > 100
    for _, link in marked:
        _, _, path = link.rpartition("(")
        assert (faults.PAGE.parent / path.removesuffix(")")).is_file()


@pytest.mark.parametrize(
    ("fault", "words"), [("nobody lists this", "does not list"), (None, "no test shows")]
)
def test_a_mark_without_a_fault_and_a_fault_without_a_mark(
    monkeypatch: pytest.MonkeyPatch, fault: str | None, words: str
) -> None:
    marked = list(faults.marked_tests())
    lost = "read-only bundle"
    changed = [item for item in marked if item[0] != lost] if fault is None else marked
    monkeypatch.setattr(faults, "marked_tests", lambda: [*changed, *[(fault, "x")] * bool(fault)])
    with pytest.raises(ValueError, match=words):
        faults.render()
