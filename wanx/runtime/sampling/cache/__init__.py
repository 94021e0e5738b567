"""Step cache: steps whose velocities are predicted from those before, without the network.

Begin with :mod:`wanx.runtime.sampling.cache.base`. A schedule is chosen before the run by what
skipping was measured to cost (``table``, ``search``), by published coefficients (``teacache``), or
while the run goes on (``easy``). Imports the samplers' base and guidance alone.
"""

from __future__ import annotations
