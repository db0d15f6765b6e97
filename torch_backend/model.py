"""A base model of transformers' zoo with our quantized and adapter layers in it.

Parameter names are Hugging Face's throughout; `.base` and `.inner` parts of our own layers never show.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shared.adapters.own import is_own
from shared.adapters.spec import is_trained, within_layers
from shared.errors import ModelError
from shared.generation.loop import generate
from shared.protocols import Rows
from shared.strict import check_adapter
from shared.types import AdapterSpec, Batch, ModelInfo, Part, Recompute, Sampling, Shape, Tensor, Token
from torch_backend import attention, generation, objectives
from torch_backend.adapters import Dropout, adapter_parameters, attach_lora
from torch_backend.dora import attach_dora, magnitudes
from torch_backend.ends import attach_ends
from torch_backend.experts import attach_experts
from torch_backend.offload import offload_layers
from torch_backend.own import attach_own
from torch_backend.state import from_torch, send, to_torch
from torch_backend.whole import attach_whole


class TorchModel:
    """A loaded base; `attach` makes something of it trainable."""

    def __init__(self, zoo: Any, head: objectives.Head, info: ModelInfo, *, device: torch.device) -> None:
        self.zoo, self.head, self.info, self.device = zoo, head, info, device
        self.decoder = zoo.get_decoder()
        self.dropout = Dropout(p=0.0)
        self.parameters: dict[str, nn.Parameter] = {}
        self.recompute: Recompute = False
        self.shapes: frozenset[Shape] = frozenset()  # of micro-batches that run compiled
        self.runs_compiled = False  # the last one does

    def attach(self, spec: AdapterSpec) -> None:
        """Make the spec's adapter layers trainable, or for kind "none" every parameter."""
        if spec.kind != "none":
            spec = replace(spec, tied=spec.tied and self.info.is_tied)
            self.dropout = Dropout(p=spec.dropout)
            attach = attach_own if is_own(spec.kind) else attach_dora if spec.kind == "dora" else attach_lora
            attach(self.zoo, within_layers(spec, self.info), self.dropout, self.info.linears)
            attach_experts(self.zoo, spec, self.info.experts)
            whole = attach_whole(self.zoo, spec, head=self.head.module)
            adapted = attach_ends(self.zoo, spec, self.info.ends)
            head = next((one for one in (adapted, whole) if one is not None), self.head.module)
            self.head = replace(self.head, module=head)
            self.parameters = dict(adapter_parameters(self.zoo))
        else:
            self.parameters = dict(self.zoo.named_parameters())
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Return (N, D) last hidden states at the positions that predict supervised tokens."""
        self.runs_compiled = batch.shape in self.shapes and not batch.is_packed
        tokens_BT = self.put(batch.tokens_BT, torch.long)
        positions_N = self.put(batch.positions_N, torch.long)  # before the decoder: a copy waits for what is queued
        h_BTD = self.decoder(input_ids=tokens_BT, use_cache=False, **self.places(batch)).last_hidden_state
        return h_BTD.flatten(0, 1).index_select(0, positions_N)  # the backward of [] would sort the positions

    def places(self, batch: Batch) -> dict[str, Any]:
        """Return what the decoder has to know of examples that do not begin their row; positions are from 0 in each."""
        if not batch.is_packed and batch.padding_side == "right":
            return {}
        positions = {"position_ids": self.put(batch.places()[1], torch.long)}
        if batch.padding_side == "left":
            pads_B = self.put(batch.pads_B, torch.long)
            return positions | attention.left_padded(self.zoo, pads_B, length=batch.shape.tokens)
        bounds = self.put(np.append(batch.starts_S, batch.tokens_BT.size), torch.int32)
        return {**positions, "segments": batch.lengths_S.tolist(), "bounds": bounds}

    def put(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """Return an array on the device, without waiting for it on CUDA."""
        return send(torch.from_numpy(array).to(dtype), self.device)

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> np.ndarray:
        """Return (N,) float32 log-probabilities of the targets in nats."""
        targets_N = self.put(batch.targets_N, torch.long)
        return objectives.log_probs(self.hidden(batch), self.head, targets_N).cpu().numpy()

    def tensors(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """Yield the base's or the trained tensors under canonical names."""
        if part == "adapter":
            yield from ((name, from_torch(value)) for name, value in self.parameters.items())
            return
        for name, value in self.zoo.state_dict().items():
            if not is_trained(name):
                yield name.replace(".base.", "."), from_torch(value)

    def magnitudes(self) -> dict[str, Tensor]:
        """Return the norms that DoRA's magnitudes start from."""
        return magnitudes(self.zoo)

    def load_tensors(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        """Replace the trained tensors (part "adapter"); strict on names, shapes and finite values."""
        if part != "adapter":
            raise ModelError("a base is loaded from its folder, not replaced", code="E309", fix="load the other model")
        check_adapter(tensors, expected={name: tuple(value.shape) for name, value in self.parameters.items()})
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(to_torch(tensors[name]))

    def rows(self, *, width: int) -> Rows:
        """Return room for so many sequences side by side, or for one at a time."""
        return generation.Rows(self.zoo, self.head, width=width)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, ended: Collection[int] = (),
        rows: Rows | None = None,
    ) -> Iterator[Token]:  # fmt: skip
        """Yield tokens as they are made, those of several prompts in turns; `ended` get no more."""
        width = min(sampling.batch_size, len(prompts)) if self.info.can_batch and rows is None else 1
        return generate(rows or self.rows(width=width), prompts, sampling, width=width, ended=ended)


def set_recompute(layers: nn.ModuleList, recompute: Recompute, *, device: torch.device) -> None:
    """Have the decoder layers keep their input only, where asked."""
    if recompute == "offload":
        offload_layers(list(layers), device)
    elif recompute:
        for layer in layers:
            layer.forward = partial(recomputed, layer.forward)


def recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a layer, keeping its input only; it runs again in the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
