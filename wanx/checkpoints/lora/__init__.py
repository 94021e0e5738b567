"""LoRA files: their names, their patches, and weights with the patches in them.

Imports ``checkpoints`` beside it. Start with ``fuse.py``.
"""
