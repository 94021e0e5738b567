"""Memory that a run takes, stage by stage, and how the VAE fits into what there is.

Begin with :mod:`wanx.runtime.memory.plan`. Imports ``bundle``, ``config``, sessions and the VAE.
"""
