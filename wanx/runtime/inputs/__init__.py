"""Images and videos that a run starts from: reading, resizing, control videos, conditioning.

Start with ``reading.py``.
"""
