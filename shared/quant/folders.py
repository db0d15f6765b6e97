"""Which tensors of a model folder hold quantized weights: one reader per way to store them.

A reader looks at config.json and at the headers, and returns a `Place` for every module that is stored quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import CapabilityError
from shared.quant.base3_folder import METHOD, find_base3
from shared.quant.bitnet_folder import find_bitnet
from shared.quant.bnb_folder import find_bitsandbytes
from shared.quant.mlx_folder import find_mlx
from shared.quant.place import Place
from shared.quant.quanto_folder import MAP, find_quanto
from shared.tensors import Entry


def find_places(path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Place]:
    """Return the place of every module that the folder stores quantized; raises ModelError or CapabilityError."""
    foreign = config.get("quantization_config")
    method = foreign.get("quant_method") if isinstance(foreign, dict) and not config.get("quantization") else None
    if method is None:
        return find_quanto(path, config, entries) if (path / MAP).is_file() else find_mlx(path, config, entries)
    if not isinstance(method, str) or method not in READERS:
        raise CapabilityError(
            f"the folder is quantized with {method}, which this version does not read",
            expected=f"float weights, an mlx-lm folder, or one of: {', '.join(READERS)}",
            fix="use the unquantized model with quantization: affine-4bit-g64",
        )
    return READERS[method](path, config, entries)


READERS = {  # quant_method of a folder's quantization_config -> its reader
    "bitsandbytes": find_bitsandbytes,
    "bitnet": find_bitnet,
    METHOD: find_base3,
}
