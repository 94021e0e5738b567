"""Facts of the Wan models, and bounds on configurations that come from files.

Imports nothing of wanx. Start with ``models.py``.
"""
