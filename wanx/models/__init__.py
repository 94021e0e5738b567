"""Networks of Wan2.1 in PyTorch, written to be traced.

Parameter names are the tensor names of the original checkpoints. Imports ``kernels`` and
``config``. Start with ``dit/model.py``.
"""
