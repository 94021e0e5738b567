"""Quantisation: number formats, recipe, 8-bit weights, and readback of what was built.

Start with ``recipe.py``.
"""
