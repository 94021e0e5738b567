"""Sessions on ONNX Runtime, on the processor or on what its execution providers reach.

Start with ``session.py``; ``providers.py`` is the table of providers.
"""
