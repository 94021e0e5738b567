"""Sessions on ONNX Runtime, on the processor or on what its execution providers reach.

Start with ``session.py``; ``loading.py`` makes ONNX Runtime's own sessions, and ``providers.py`` is
the table of providers.
"""
