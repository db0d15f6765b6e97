"""What each backend does with each architecture, found out by trying on tiny random models: docs/architectures.md.

`python -m tests.architectures` writes the page's table anew.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.adapters.spec import initial_adapter, resolve
from shared.adapters.writing import write_adapter
from shared.config import AdapterConfig
from shared.data.batch import make_batch, micro_batches
from shared.data.layout import Layout
from shared.errors import MlxloraError
from shared.families import with_old_keys
from shared.registry import BACKENDS, find_backend
from shared.strict import check_length
from shared.tensors import to_float32
from shared.types import Batch, Example, Method, Tensor, Update
from tests import tolerances
from tests.conftest import save_tokenizer

PAGE = Path(__file__).resolve().parents[1] / "docs/architectures.md"
START, END = "<!-- architectures: made by tests/architectures.py -->\n", "<!-- end of architectures -->"
TITLES = {"mlx": "MLX", "torch": "PyTorch"}
COLUMNS = ("loads", "trains", "parity 1e-4", "adapter in PEFT", "adapter in mlx-lm", "packed / sorted equal")
LENGTHS = (30, 40, 17, 5, 26, 33)
UPDATES = 8
USUAL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "num_hidden_layers": 2, "vocab_size": 269, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0}  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One row: a title, the model type and what its config says beyond the usual tiny one.

    in_mlx_lm: why mlx-lm alone does not compute this base as transformers does, where it does not. targets: of the
    adapter.
    """

    title: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    in_mlx_lm: str = ""
    targets: str | list[str] = "all-linear"


SORTED = "sorted: `data.packing: auto` sorts instead, packed rows are not proven for this family on this backend"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 8, "sliding_window": 10}
ALTERNATING = ["sliding_attention", "full_attention"]
WINDOW = "in rows up to the window only: mlx-lm alone applies none in this family"
SHORT = 8  # tokens, within every window here
MIXTURES = (
    ("Mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Qwen 2 MoE", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    ("Qwen 3 MoE", "qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
)
ARCHITECTURES = (
    Architecture("Llama 2", "llama", {"num_key_value_heads": 4}),
    Architecture("Llama 3.x (rope scaling)", "llama", {"rope_parameters": LLAMA3_ROPE}),
    Architecture("SmolLM 2 (Llama, tied)", "llama", {"tie_word_embeddings": True}),
    Architecture("SmolLM 3", "smollm3", {"no_rope_layers": [1, 0]}),
    Architecture("Mistral", "mistral", {"sliding_window": None, "head_dim": 32}),
    Architecture("Mistral, sliding window", "mistral", {"sliding_window": 10}, in_mlx_lm=WINDOW),
    Architecture("Qwen 2", "qwen2"),
    Architecture(
        "Qwen 2, sliding windows",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
        in_mlx_lm=WINDOW,
    ),
    Architecture("Qwen 3", "qwen3", {"head_dim": 32}),
    *(Architecture(*mixture) for mixture in MIXTURES),
    *(
        Architecture(f"{title}, experts adapted", family, settings, targets=["all-linear", "experts"])
        for title, family, settings in MIXTURES
    ),
    Architecture(
        "Gemma 2", "gemma2", {**GEMMA, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 5.0}, in_mlx_lm=WINDOW
    ),
    Architecture("Gemma 3 (text)", "gemma3_text", {**GEMMA, "layer_types": ALTERNATING}),
    Architecture("Phi 3", "phi3", {"sliding_window": None}),
    Architecture("Phi 3, sliding window", "phi3", {"sliding_window": 10}, in_mlx_lm=WINDOW),
    Architecture("Granite", "granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    Architecture("Cohere", "cohere", {"use_qk_norm": True, "logit_scale": 0.25}),
    Architecture("Cohere 2", "cohere2", {"sliding_window": 10, "head_dim": 16, "layer_types": ALTERNATING}),
    Architecture("OLMo 2", "olmo2"),
    Architecture("OLMo 3", "olmo3", {"sliding_window": 10, "layer_types": ALTERNATING}),
)


def save(folder: Path, family: str, settings: dict[str, Any]) -> Path:
    """Write a random model and a tokenizer as transformers does; norms and biases are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**USUAL, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return save_tokenizer(folder)


def load(backend: str, folder: Path, **options: Any) -> Any:
    """Return a base in float32 on the CPU."""
    options = {"dtype": "float32", "quantization": None, "recompute": False, "device": "cpu", **options}
    return find_backend(backend).load_model(folder, **options)


def wanted_log_probs(folder: Path, examples: Sequence[Example], **options: Any) -> np.ndarray:
    """Return transformers' log-probabilities of the supervised tokens, one example at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    found = []
    for example in examples:
        with torch.no_grad():
            logp = plain(torch.from_numpy(example.tokens)[None].long()).logits[0].log_softmax(-1).numpy()
        at = np.flatnonzero(example.supervised)
        found.append(logp[at - 1, example.tokens[at]])
    return np.concatenate(found)


class Trial:
    """One architecture on one backend: every column is a method that raises, or returns whether it holds."""

    def __init__(
        self, folder: Path, backend: str, examples: Sequence[Example], *, targets: str | list[str] = "all-linear"
    ) -> None:
        self.folder, self.backend, self.examples, self.targets = folder, backend, list(examples), targets
        self.ids = self.examples[1].tokens.tolist()
        self.losses: list[float] = []
        self.trained: dict[str, Tensor] = {}
        self.model: Any = None
        self.options: dict[str, Any] = {}  # of loading

    def loads(self) -> bool:
        """Return whether the log-probabilities are those of transformers' eager attention."""
        model = load(self.backend, self.folder)
        check_length(model.info, max(LENGTHS), what="row")
        found = model.log_probs(make_batch(self.examples, range(len(self.examples))))
        wanted = wanted_log_probs(self.folder, self.examples, attn_implementation="eager")
        return bool(np.abs(found - wanted).max() <= 2 * tolerances.LOGITS)

    def fresh(self, **settings: Any) -> tuple[Any, Any, Any]:
        """Return a model with a LoRA whose B is not zero, its trainer and its spec."""
        model = load(self.backend, self.folder, **self.options)
        spec = resolve(AdapterConfig(**{"rank": 4, "targets": self.targets, **settings}), model.info)
        values = initial_adapter(spec, model.info.adaptable, seed=0)
        for name, tensor in values.items():
            if name.endswith("lora_B"):
                tensor.data[:] = 0.02 * np.random.default_rng(len(name)).standard_normal(tensor.shape)
        model.attach(spec)
        model.load_tensors("adapter", values)
        return model, find_backend(self.backend).trainer(model, objective="sft", optimizer=Method("adamw")), spec

    def trains(self) -> bool:
        """Return whether a few updates on the same rows lower the loss."""
        self.model, trainer, self.spec = self.fresh()
        batches = micro_batches(self.examples, Layout(4096, packed=False))
        self.losses = [trainer.step(batches, update(step)).result().loss for step in range(1, UPDATES + 1)]
        self.trained = dict(self.model.tensors("adapter"))
        return bool(np.isfinite(self.losses).all() and self.losses[-1] < self.losses[0] - 0.05)

    def layouts(self) -> str | bool:
        """Return whether sorted (and packed, where it packs) micro-batches give the gradient of one padded batch."""
        count, packs = len(self.examples), load(self.backend, self.folder).info.can_pack
        loss, wanted = self.gradient([make_batch(self.examples, range(count))])
        size = np.sqrt(sum((array**2).sum() for array in wanted.values()))
        for packed in (False, True)[: 1 + packs]:
            found, other = self.gradient(micro_batches(self.examples, Layout(2 * max(LENGTHS), packed=packed)))
            gap = np.sqrt(sum(((other[name] - wanted[name]) ** 2).sum() for name in wanted))
            if abs(found - loss) > tolerances.LAYOUT * abs(loss) or gap > tolerances.LAYOUT_ARCHITECTURES * size:
                return False
        return True if packs else SORTED

    def gradient(self, batches: list[Batch]) -> tuple[float, dict[str, np.ndarray]]:
        """Return the loss and AdamW's first moment, which is the gradient up to a factor."""
        _, trainer, _ = self.fresh()
        loss = trainer.step(batches, update(1, max_grad_norm=None)).result().loss
        found = {name: to_float32(tensor).astype(np.float64) for name, tensor in trainer.state() if name[:2] == "m."}
        return loss, found

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return (T, V) of the trained model."""
        if self.backend == "mlx":
            import mlx.core as mx

            return np.array(self.model.head.logits(self.model.decoder(mx.array([ids]))[0]))
        import torch

        with torch.no_grad():
            hidden = self.model.decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            return self.model.head.logits(hidden).numpy()

    def write(self, folder: Path) -> Path:
        """Write the trained adapter, for both libraries."""
        folder.mkdir()
        write_adapter(folder, self.spec, self.trained, self.model.info, base=str(self.folder), notes={})
        return folder


def update(step: int, **changes: Any) -> Update:
    """Return AdamW's usual numbers."""
    usual = {"seed": 0, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "bias_correction": True, "momentum": 0.9, "nesterov": False}  # fmt: skip
    return Update(step=step, **{**usual, **changes})


def rows() -> list[Example]:
    """Return the examples of every trial; longer than the windows of the tiny models."""
    random, found = np.random.default_rng(0), []
    for number, length in enumerate(LENGTHS):
        tokens = random.integers(3, 256, length, dtype=np.int32)
        found.append(Example(tokens, np.arange(length) >= length // 3, f"row {number}"))
    return found


def peft_logits(folder: Path, adapter: Path | None, ids: list[int]) -> np.ndarray:
    """Return (T, V) logits of transformers, with an adapter folder as PEFT loads it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings():  # PEFT looks for the ranks of parameters among its modules only, and takes them
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


def mlx_lm_logits(folder: Path, adapter: Path | None, ids: list[int]) -> np.ndarray:
    """Return (T, V) logits of mlx-lm, with an adapter folder as it loads it."""
    import mlx.core as mx
    import mlx_lm

    model, _ = mlx_lm.load(str(folder), adapter_path=None if adapter is None else str(adapter))
    return np.array(model(mx.array([ids])))[0]


def in_mlx_lm(trial: Trial, adapter: Path, reason: str) -> bool | str:
    """Return whether mlx-lm gives the trial's logits with its adapter folder, or why it does not: its base is off."""
    ids = trial.ids
    if alike(mlx_lm_logits(trial.folder, adapter, ids), trial.logits(ids)):
        return True
    same_base = alike(mlx_lm_logits(trial.folder, None, ids), peft_logits(trial.folder, None, ids))
    same_short = alike(mlx_lm_logits(trial.folder, adapter, ids[:SHORT]), trial.logits(ids[:SHORT]))
    return f"yes: {reason}" if same_short and reason and not same_base else False


def alike(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Return whether logits agree as the contract has it."""
    return bool(np.abs(found - wanted).max() <= tolerances.LOGITS * max(np.abs(wanted).max() / 10, 1))


def examine(architecture: Architecture) -> dict[str, dict[str, str]]:
    """Return backend -> column -> what was found: "yes", "no", or a reason."""
    place = Path(tempfile.mkdtemp())
    try:
        folder = as_on_the_hub(save(place / "model", architecture.family, architecture.settings))
        trials = {name: Trial(folder, name, rows(), targets=architecture.targets) for name in BACKENDS}
        found = {name: columns_of(trial, architecture, place / f"adapter-{name}") for name, trial in trials.items()}
    finally:
        shutil.rmtree(place)
    one, two = (trial.losses for trial in trials.values())
    same = bool(one) and np.allclose(one, two, rtol=tolerances.CURVE, atol=0)
    for cells in found.values():
        cells["parity 1e-4"] = told(same) if one and two else "no: one of the two does not train it"
    return found


def columns_of(trial: Trial, architecture: Architecture, adapter: Path) -> dict[str, str]:
    """Return one backend's cells, all but that of parity."""
    cells = {"loads": attempt(trial.loads)}
    if cells["loads"] != "yes":
        return {**dict.fromkeys(COLUMNS, ""), **cells}
    cells["trains"] = attempt(trial.trains)
    trial.write(adapter)
    cells["adapter in PEFT"] = told(alike(peft_logits(trial.folder, adapter, trial.ids), trial.logits(trial.ids)))
    cells["adapter in mlx-lm"] = told(in_mlx_lm(trial, adapter, architecture.in_mlx_lm))
    cells["packed / sorted equal"] = attempt(trial.layouts)
    return cells


def attempt(probe: Callable[[], bool | str]) -> str:
    """Return what a probe says, or the reason by which it is refused."""
    try:
        return told(probe())
    except MlxloraError as error:
        return "refused: " + str(error).partition("\n")[0]


def told(found: bool | str) -> str:
    """Return a verdict in a word, or the reason as it is."""
    return found if isinstance(found, str) else "yes" if found else "no"


def as_on_the_hub(folder: Path) -> Path:
    """Write the rope settings under the older keys too, which folders on the hub have and mlx-lm reads."""
    file = folder / "config.json"
    file.write_text(json.dumps(with_old_keys(json.loads(file.read_text()))))
    return folder


def table(found: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """Return the matrix in Markdown; found: architecture -> backend -> column -> verdict. Reasons stand beneath."""
    lines = [f"| architecture | backend | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    reasons: list[str] = []
    for title, backends in found.items():
        shown = {name: [shorten(cells[column], reasons) for column in COLUMNS] for name, cells in backends.items()}
        if len(set(map(tuple, shown.values()))) == 1:
            shown = {"both": next(iter(shown.values()))}
        for name, cells in shown.items():
            lines.append(f"| {title} | {TITLES.get(name, name)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]) + "\n"


def shorten(verdict: str, reasons: list[str]) -> str:
    """Return a verdict without its reason, which goes to the list under a number."""
    word, _, reason = verdict.partition(": ")
    if not reason:
        return word
    if reason not in reasons:
        reasons.append(reason)
    return f"{word} ({reasons.index(reason) + 1})"


def written() -> dict[str, dict[str, dict[str, str]]]:
    """Return what the page says, as `table` takes it."""
    lines = PAGE.read_text().partition(START)[2].partition(END)[0].split("\n")
    reasons = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    found: dict[str, dict[str, dict[str, str]]] = {}
    for line in lines:
        title, name, *cells = (cell.strip() for cell in line.strip("|").split("|")) if line[:1] == "|" else ("", "")
        if title in {architecture.title for architecture in ARCHITECTURES}:
            cells = [re.sub(r" \((\d+)\)$", lambda match: f": {reasons[match[1]]}", cell) for cell in cells]
            backends = [key for key in BACKENDS if name in ("both", TITLES[key])]
            found.setdefault(title, {}).update({key: dict(zip(COLUMNS, cells, strict=True)) for key in backends})
    return found


def main() -> None:
    """Write the table into the page; arguments: the titles to examine, all where there are none."""
    chosen = [one for one in ARCHITECTURES if not sys.argv[1:] or one.title in sys.argv[1:]]
    new = written() | {architecture.title: examine(architecture) for architecture in chosen}
    found = {one.title: new[one.title] for one in ARCHITECTURES if one.title in new}
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + "\n" + table(found) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
