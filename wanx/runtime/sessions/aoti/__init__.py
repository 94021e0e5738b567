"""Session on packages compiled by PyTorch's AOTInductor; the only part of the runtime with PyTorch.

Start with ``session.py``.
"""
