"""Export of a checkpoint to a bundle, and engines for a target from a bundle.

Needs PyTorch and onnx (the extra ``export``). Start with ``export.py``; ``build.py`` makes engines.
"""
