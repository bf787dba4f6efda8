"""Where kernels are tested: on a CUDA device, or step by step in Triton's interpreter (TRITON_INTERPRET=1) on a CPU.

A test module that imports this is skipped where there is neither, before it imports what is written in Triton.
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("neither a CUDA device nor Triton's interpreter", allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
"""Of what is compared with a reference: interpreted kernels show errors of arithmetic, not of rounding."""
