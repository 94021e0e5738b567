"""Files as bytes: checked reading, hashing, copying, safetensors, floats, the ONNX wire format.

Imports config and errors only. Start with ``input_file.py``.
"""
