"""Brings arrays to a device without waiting for what it still has to do. Knows nothing of what they hold."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The array as a tensor there.

    A GPU's driver copies from ordinary memory only when the device has done all that it was asked to before.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
