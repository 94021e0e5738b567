"""Time of a run, predicted before it runs."""

from __future__ import annotations
