"""Diffusion transformer: model, block, fused block and embeddings.

Start with ``model.py``.
"""
