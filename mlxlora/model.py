"""A base model of mlx-lm's zoo with our quantized and adapter layers in it.

Parameter names are Hugging Face's throughout; `.base` parts of our own layers never show.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.nn.utils import checkpoint
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora import generation, objectives
from mlxlora.adapters import Dropout, adapter_modules, attach_lora
from mlxlora.attention import LeftPadded, Segments
from mlxlora.dora import attach_dora, magnitudes
from mlxlora.ends import attach_ends
from mlxlora.experts import attach_experts
from mlxlora.own import attach_own
from mlxlora.state import from_mlx, to_mlx
from mlxlora.whole import attach_whole
from shared.adapters.own import is_own
from shared.adapters.spec import is_trained, within_layers
from shared.errors import ModelError
from shared.experts import mlx_stack, own_stack
from shared.generation.loop import generate
from shared.protocols import Rows
from shared.strict import check_adapter, check_length
from shared.types import AdapterSpec, Batch, ModelInfo, Part, Sampling, Tensor, Token

LONG = 256  # rows alone that are longer take our attention: MLX's own keeps (T, T) scores on a CPU


class MLXModel:
    """A loaded base; `attach` makes something of it trainable."""

    def __init__(self, zoo: Any, head: objectives.Head, info: ModelInfo) -> None:
        self.zoo, self.head, self.info = zoo, head, info
        self.decoder = zoo.model
        self.dropout = Dropout(p=0.0)
        self.trains_head = False
        self.recomputes = False

    def attach(self, spec: AdapterSpec) -> None:
        """Make the spec's adapter layers trainable, or for kind "none" every parameter."""
        self.zoo.freeze()
        if spec.kind != "none":
            spec = replace(spec, tied=spec.tied and self.info.is_tied)
            self.dropout = Dropout(p=spec.dropout)
            attach = attach_own if is_own(spec.kind) else attach_dora if spec.kind == "dora" else attach_lora
            attach(self.zoo, within_layers(spec, self.info), self.dropout, self.info.linears)
            attach_experts(self.zoo, spec, self.info.experts, self.info.family)
            whole = attach_whole(self.zoo, spec, head=self.head.module)
            adapted = attach_ends(self.zoo, spec, self.info.ends)
            head = next((one for one in (adapted, whole) if one is not None), self.head.module)
            self.head = replace(self.head, module=head)
            self.trains_head = whole is not None
            for module in adapter_modules(self.zoo).values():
                module.unfreeze(keys=list(module.trained_leaves), recurse=False)
        else:
            self.zoo.unfreeze()
            self.trains_head = True

    @property
    def parameters(self) -> dict[str, mx.array]:
        """Return the trained tensors by canonical name."""
        return {self.canonical(name): value for name, value in flatten(self.zoo.trainable_parameters())}

    def put_parameters(self, values: Mapping[str, mx.array]) -> None:
        """Replace the trained tensors."""
        places = {mlx_stack(self.info.family, name): value for name, value in values.items()}
        self.zoo.update(tree_unflatten(list(places.items())))

    @staticmethod
    def canonical(name: str) -> str:
        """Return the Hugging Face name of an MLX parameter."""
        own = name.replace(".base.", ".")
        return own_stack(own) if is_trained(own) else own

    def hidden(self, batch: Batch) -> mx.array:
        """Return (N, D) last hidden states at the positions that predict supervised tokens."""
        packed = batch.lengths_S.tolist() if batch.is_packed else ()
        pads_B = mx.array(batch.pads_B) if batch.padding_side == "left" else None
        return self.hidden_at(mx.array(batch.tokens_BT), mx.array(batch.positions_N), packed=packed, pads_B=pads_B)

    def hidden_at(
        self, tokens_BT: mx.array, positions_N: mx.array, *, packed: Sequence[int] = (), pads_B: mx.array | None = None
    ) -> mx.array:
        """Return what `hidden` does, of arrays; packed: lengths of the examples in the one row."""
        length = tokens_BT.shape[1]
        ours = self.info.can_pack and (bool(packed) or length > LONG)
        cache = LeftPadded(pads_B) if pads_B is not None else Segments(packed or [length]) if ours else None
        h_BTD = self.decoder(tokens_BT, cache=None if cache is None else [cache] * self.info.num_layers)
        return h_BTD.flatten(0, 1)[positions_N]

    def log_probs(self, batch: Batch) -> np.ndarray:
        """Return (N,) float32 log-probabilities of the targets in nats."""
        return np.array(objectives.log_probs(self.hidden(batch), self.head, mx.array(batch.targets_N)))

    def tensors(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """Yield the base's or the trained tensors under canonical names."""
        if part == "adapter":
            yield from ((name, from_mlx(value)) for name, value in self.parameters.items())
            return
        for name, value in flatten(self.zoo.parameters()):
            alias = self.info.is_tied and name.startswith("lm_head.")  # the embedding's values, where the head is apart
            if not alias and not is_trained(name):
                yield self.canonical(name), from_mlx(value)

    def magnitudes(self) -> dict[str, Tensor]:
        """Return the norms that DoRA's magnitudes start from."""
        return magnitudes(self.zoo)

    def load_tensors(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        """Replace the trained tensors (part "adapter"); strict on names, shapes and finite values."""
        if part != "adapter":
            raise ModelError("a base is loaded from its folder, not replaced", code="E309", fix="load the other model")
        own = self.parameters
        check_adapter(tensors, expected={name: tuple(value.shape) for name, value in own.items()})
        self.put_parameters({name: to_mlx(tensors[name]).astype(value.dtype) for name, value in own.items()})
        mx.eval(self.zoo.trainable_parameters())

    def rows(self, *, width: int) -> Rows:
        """Return room for so many sequences side by side, or for one at a time."""
        return generation.Rows(self.zoo, self.head, width=width)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, ended: Collection[int] = (),
        rows: Rows | None = None,
    ) -> Iterator[Token]:  # fmt: skip
        """Yield tokens as they are made, those of several prompts in turns; `ended` get no more."""
        for prompt in prompts:
            check_length(self.info, len(prompt) + sampling.max_tokens, what="prompt and answer")
        width = min(sampling.batch_size, len(prompts)) if self.info.can_batch and rows is None else 1
        return generate(rows or self.rows(width=width), prompts, sampling, width=width, ended=ended)


def flatten(tree: Any) -> list[tuple[str, mx.array]]:
    """Return (dotted name, array) of a parameter tree."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def recomputing(layer_class: type) -> type:
    """Return the class of a layer that keeps its input only and runs again in the backward pass.

    A class of its own for one instance: the layer keeps its parameters' names, and the zoo's class is untouched.
    """

    class Recomputing(layer_class):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(self, super().__call__)(*args, **kwargs)

    Recomputing.__name__ = Recomputing.__qualname__ = f"Recomputing{layer_class.__name__}"
    return Recomputing
