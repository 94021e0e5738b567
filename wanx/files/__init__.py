"""Files as bytes: checked reading, hashing, copying, safetensors and the ONNX wire format.

Imports errors only. Start with ``input_file.py``.
"""
