"""Video and image files: encoding, provenance metadata, and checks before and after computing.

Start with ``video.py``.
"""
