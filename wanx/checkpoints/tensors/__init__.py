"""Tensors of checkpoints, read in chunks: plain ones, and those computed from what files hold.

Imports nothing of wanx but ``files``, ``config`` and ``errors``. Start with ``source.py``.
"""
