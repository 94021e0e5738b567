"""Presentation of a benchmark: page, plots, frames and Markdown tables.

Start with ``page.py``.
"""
