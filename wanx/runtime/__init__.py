"""Generation of videos from a bundle, without PyTorch and model code.

Start with ``pipeline.py``.
"""
