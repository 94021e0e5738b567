"""The VAE's part of a run: whole frames, or tiles of them that give the same.

Begin with :mod:`wanx.runtime.vae.tiles`. Imports ``bundle``, ``config`` and sessions.
"""
