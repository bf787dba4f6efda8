"""How kernels of exact passes begin, so that a kernel is launched while the one before it still runs.

A step of one row is hundreds of short kernels one after the other. Each waits here for those before it, before it reads
or writes anything, and then lets the next one be launched. Knows no kernels.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OVERLAPS = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether there is a device that launches so; its instructions do nothing where the launch does not ask for it."""


@triton.jit
def in_turn():
    """First in every program, also of those that have nothing to do."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
