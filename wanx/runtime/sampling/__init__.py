"""Mathematics of sampling: solvers, classifier-free guidance, seeded noise.

Start with ``sampler.py``.
"""
