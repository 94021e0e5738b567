"""Comparison of a candidate bundle with a reference: ``wanx compare``.

Start with ``compare.py``; ``teacher_forcing.py`` says how steps are compared, ``clips.py`` how
videos are.
"""
