"""Recompute with the layers' inputs in host memory: each leaves on a stream of its own and is back before it is needed.

Only for CUDA: with unified memory (MLX on a Mac, any backend on a CPU) there is no second memory to move to.
Nothing waits on the host. The device's main stream waits for a copy before memory is given back or values are read.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Slot:
    """The input of one layer in one forward pass: on the device, then on the host, then on the device again."""

    def __init__(self, x: torch.Tensor, *, stream: torch.cuda.Stream | None, before: Slot | None) -> None:
        self.stream, self.before = stream, before
        self.device, self.requires_grad = x.device, x.requires_grad
        self.here: torch.Tensor | None = x
        self.host: torch.Tensor | None = None
        self.gone: Any = None  # the copy to the host is done
        self.back: Any = None  # the copy from the host is done
        self.forwarded = False

    def leave(self) -> None:
        """Begin the copy to the host; the device keeps its own until `release`."""
        assert self.here is not None
        x = self.here.detach()
        if self.stream is None:
            self.host = x.clone()
            return
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.host.copy_(x, non_blocking=True)
        self.gone = self.stream.record_event()

    def release(self) -> None:
        """Give the device's memory back, in the main stream's order: `record_stream` would hold it for the host."""
        if self.host is None:
            return
        if self.gone is not None:
            torch.cuda.current_stream(self.device).wait_event(self.gone)
        self.here = None

    def fetch(self) -> None:
        """Begin the copy from the host, unless the device has the values."""
        if self.here is not None or self.host is None:
            return
        self.here = torch.empty_like(self.host, device=self.device)
        if self.stream is None:
            self.here.copy_(self.host)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # whoever had this memory has done with it
        with torch.cuda.stream(self.stream):
            self.here.copy_(self.host, non_blocking=True)
        self.back = self.stream.record_event()

    def take(self) -> torch.Tensor:
        """Return the input: the layer's own in the forward pass, a copy that begins a new graph in the backward."""
        if not self.forwarded:
            self.forwarded = True
            assert self.here is not None
            return self.here
        self.fetch()
        if self.before is not None:
            self.before.fetch()  # while this layer is busy
        self.settle()
        x, self.here = self.here, None if self.host is not None else self.here
        assert x is not None
        return x.detach().requires_grad_(self.requires_grad)

    def settle(self) -> None:
        """Have the main stream wait for a copy from the host that is under way."""
        if self.back is not None:
            torch.cuda.current_stream(self.device).wait_event(self.back)
            self.back = None

    def __del__(self) -> None:
        self.settle()  # a backward pass that was given up (out of memory): its memory is still being written


class Shelf:
    """What the layers of one model share: the stream for copies, and the input put away last."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: weakref.ref[Slot] | None = None

    def put(self, x: torch.Tensor, *, first: bool, last: bool) -> Slot:
        """Return the slot of the next layer's input; the last layer's stays, since its backward comes at once."""
        before = None if first or self.last is None else self.last()
        if before is not None:
            before.release()
        slot = Slot(x, stream=self.stream, before=before)
        self.last = weakref.ref(slot)
        if not last:
            slot.leave()
        return slot


def offload_layers(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Have each decoder layer keep its input only, on the host; on a CPU the same code copies within its memory."""
    shelf = Shelf(device)
    for number, layer in enumerate(layers):
        ends = {"first": number == 0, "last": number == len(layers) - 1}
        layer.forward = partial(offloaded, layer.forward, shelf, ends)


def offloaded(forward: Any, shelf: Shelf, ends: dict[str, bool], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call a layer; in the backward pass its input comes back and it runs again."""
    if not torch.is_grad_enabled():
        return forward(x, *args, **kwargs)
    slot = shelf.put(x, **ends)

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(slot.take(), *args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
