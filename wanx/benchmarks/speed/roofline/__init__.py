"""Operations and bytes of each part of a model, against the peaks of the machine.

Counts in the ONNX graphs, for which it needs ``onnx``. Start with ``bounds.py``; the analysis that
puts it together is one folder up.
"""
