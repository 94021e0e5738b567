"""Hot spots of the model as ``wanx::`` ops, one a file: reference, kernel, op, ONNX function.

Imports config and errors only. Start with ``adaln.py``, then ``registry.py`` and ``launch.py``.
"""
