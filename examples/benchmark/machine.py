"""Name of the machine that a table is from."""

from __future__ import annotations

import platform

import peft
import torch
import transformers


def machine(device: torch.device) -> str:
    """Return the hardware and the versions that figures were measured with."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return (
        f"{hardware}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}"
    )
