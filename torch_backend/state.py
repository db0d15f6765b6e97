"""Tensors across the line: NumPy words with a dtype name <-> torch, bfloat16 as its 16-bit words."""

from __future__ import annotations

import numpy as np
import torch

from shared.types import Tensor

TO_TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U32": torch.uint32, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
FROM_TORCH = {dtype: name for name, dtype in TO_TORCH.items()}


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Return a torch tensor with its own memory."""
    data = np.array(tensor.data)
    if tensor.dtype == "BF16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def from_torch(value: torch.Tensor) -> Tensor:
    """Return the words of a torch tensor as NumPy, copied to the host."""
    host = value.detach().to("cpu").contiguous()
    if host.dtype == torch.bfloat16:
        return Tensor("BF16", host.view(torch.int16).numpy().view(np.uint16).copy())
    return Tensor(FROM_TORCH[host.dtype], host.numpy().copy())


def send(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a host tensor on the device; from pinned memory, so that nobody waits for what is queued on CUDA."""
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called "float32", "bfloat16" or "float16"."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
