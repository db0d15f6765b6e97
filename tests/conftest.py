"""What all tests share: tiny real models and tokenizers, made on the spot; skips are counted with their reasons.

BLAS and thread settings come first: they only work before mlx or torch is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from mlxlora.backend import lend_blas
from shared.data.tokenize import Tokenizer, load_tokenizer
from shared.threads import wait_politely
from shared.types import Example, Update

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread only waits
wait_politely()
lend_blas()
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network
os.environ["MLXLORA_CACHE"] = tempfile.mkdtemp(prefix="mlxlora-test-cache-")  # nor the user's cache
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parent.parent
NEEDED = ("mlx", "mlx_lm", "torch", "transformers", "tokenizers", "peft", "gguf", "bitsandbytes")
FAMILIES = ("llama", "mistral", "qwen2")
BOS, EOS, PAD = "<|begin|>", "<|im_end|>", "<|pad|>"
SPECIAL = (PAD, BOS, "<|im_start|>", EOS)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# In rank order; the later ones span a blank and a word, as real vocabularies do.
MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "w"),
    ("Ġ", "t"),
    ("o", "r"),
    ("Ċ", "Ċ"),
    ("?", "Ġ"),
]


def pytest_configure(config: pytest.Config) -> None:
    """Stop before collection where a backend is missing: a suite without it would prove nothing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise pytest.UsageError(f"the tests need {', '.join(missing)}: install the [test] extra with the constraints")


def pytest_unconfigure() -> None:
    """Remove what the tests left in their cache."""
    shutil.rmtree(os.environ["MLXLORA_CACHE"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many tests were skipped, by reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple))
    terminalreporter.write_line(f"skips: {len(skipped)}")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"  {count} x {reason}")


def byte_tokenizer(
    *, special: tuple[str, ...], merges: list[tuple[str, str]], bos: str | None, eos_at_end: str | None
) -> Any:
    """Return a byte-level BPE of the `tokenizers` library: every text round-trips exactly."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    ends = [text for text in (bos, eos_at_end) if text]
    if ends:
        single = f"{bos or ''} $A {eos_at_end or ''}".strip()
        inner.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(text, inner.token_to_id(text)) for text in ends]
        )
    return inner


def save_tokenizer(
    folder: Path,
    *,
    special: tuple[str, ...] = SPECIAL,
    merges: list[tuple[str, str]] | None = None,
    bos: str | None = BOS,
    eos: str | None = EOS,
    pad: str | None = PAD,
    adds_bos: bool = True,
    adds_eos: bool = False,
    template: str | None = CHATML,
) -> Path:
    """Write a tokenizer folder as transformers does, and return it."""
    from transformers import PreTrainedTokenizerFast

    inner = byte_tokenizer(
        special=special,
        merges=MERGES if merges is None else merges,
        bos=bos if adds_bos else None,
        eos_at_end=eos if adds_eos else None,
    )
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False
    )
    outer.chat_template = template
    outer.save_pretrained(str(folder))
    return folder


def save_model(folder: Path, *, family: str, tied: bool, dtype: str, seed: int, layers: int) -> Path:
    """Write a random model as transformers does; norms and biases are random too, so that none hides."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary = len(SPECIAL) + 256 + len(MERGES)
    config = AutoConfig.for_model(
        family, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=256, tie_word_embeddings=tied,
        bos_token_id=vocabulary - 3, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random) * 0.1
            parameter.copy_(noise + 1 if "norm" in name else noise)
    model.to(getattr(torch, dtype)).save_pretrained(str(folder))
    return save_tokenizer(folder)


@pytest.fixture(scope="session", autouse=True)
def signals_heard():
    """Hear what a shell lets a program in the background ignore; programs that tests start would ignore it too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """Return a factory of tokenizers, arguments as `save_tokenizer` has them."""
    return lambda **options: load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer"), **options))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a factory of model folders (family, tied, dtype, seed, layers); read-only, each is written once."""

    @cache
    def write(family: str, tied: bool, dtype: str, seed: int, layers: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{'tied' if tied else 'untied'}-{dtype}")
        return save_model(folder, family=family, tied=tied, dtype=dtype, seed=seed, layers=layers)

    def make(
        family: str = "llama", *, tied: bool = False, dtype: str = "float32", seed: int = 0, layers: int = 2
    ) -> Path:
        return write(family, tied, dtype, seed, layers)

    return make


@pytest.fixture(scope="session")
def stored_model() -> Callable[[str], Path]:
    """Return a finder of real models under MLXLORA_TEST_MODELS; the test is skipped where one is absent."""
    root = Path(os.environ.get("MLXLORA_TEST_MODELS", REPOSITORY / "../shared/models")).resolve()

    def find(name: str) -> Path:
        if not (root / name / "config.json").is_file():
            pytest.skip(f"no {name} in the folder that MLXLORA_TEST_MODELS names")
        return root / name

    return find


@pytest.fixture(scope="session")
def make_update() -> Callable[..., Update]:
    """Return a factory of updates: AdamW's usual numbers, any of them replaced by name."""
    usual = {"step": 1, "seed": 0, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    return lambda **changes: Update(
        **{**usual, "max_grad_norm": 1.0, "bias_correction": True, "momentum": 0.9, "nesterov": False, **changes}
    )


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[Example]]:
    """Return a factory of random tokenized rows, their first part a prompt."""

    def make(lengths: list[int], *, vocabulary: int = 256, seed: int = 0) -> list[Example]:
        random = np.random.default_rng(seed)
        rows = []
        for number, length in enumerate(lengths):
            tokens = random.integers(0, vocabulary, length, dtype=np.int32)
            prompt = max(1, length // 3)
            rows.append(Example(tokens, np.arange(length) >= prompt, f"made.jsonl:{number + 1}"))
        return rows

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of JSONL files: objects are dumped, bytes and strings stand as they are."""

    def write(*rows: Any, name: str = "train.jsonl") -> Path:
        lines = [
            row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        file = tmp_path / name
        file.write_bytes(b"".join(line + b"\n" for line in lines))
        return file

    return write
