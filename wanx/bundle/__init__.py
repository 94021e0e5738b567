"""Bundle format: manifest, checks, atomic publishing, engine schedules and golden steps.

Imports files and the model's configuration only. Start with ``manifest.py``; ``reader.py`` opens a
bundle.
"""
