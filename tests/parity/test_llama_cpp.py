"""llama.cpp itself reads what we write: the same logits for every family, the same greedy text on real models.

These are slow and need llama-cpp-python, which builds from source: `pip install llama-cpp-python`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.adapters.folder import read_adapter
from shared.convert.gguf_file import write_adapter, write_model
from shared.data.tokenize import load_tokenizer
from shared.folder import open_folder
from shared.jobs.fuse import fuse
from shared.sessions import complete, open_session, prompt_ids, sampling_for
from tests import tolerances
from tests.adapters import save_adapter
from tests.exports import FAMILIES, save_family

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
IDS = [5, 90, 17, 200, 33, 64, 8, 120, 91, 7, 44, 13, 201, 99, 150, 3]
PROMPTS = ("Once upon a time", "The cat and the dog", "One day, a little girl")


def load(path: Path, **options):
    """Return a model in llama.cpp, with nothing rounded on the way."""
    return llama_cpp.Llama(
        str(path), n_ctx=192, logits_all=True, verbose=False, n_threads=1, type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32, **options,
    )  # fmt: skip


def logits(path: Path, **options) -> np.ndarray:
    model = load(path, **options)
    model.eval(IDS)
    return np.array(model.scores[: len(IDS)])


def reference(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """Return the logits of transformers, with PEFT's adapter if any."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


def bound(family: str, wanted: np.ndarray) -> float:
    relative = tolerances.LLAMA_CPP_GELU if family.startswith("gemma") else tolerances.LLAMA_CPP
    return relative * float(np.abs(wanted).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_transformers(family, tmp_path):
    folder = save_family(tmp_path / "model", family)
    write_model(open_folder(folder), tmp_path / "model.gguf", kind="auto")
    wanted = reference(folder)
    found = logits(tmp_path / "model.gguf")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound(family, wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_in_a_file_of_its_own_gives_the_logits_of_peft(family, tmp_path):
    folder = save_family(tmp_path / "model", family)
    adapter = save_adapter(tmp_path / "adapter", folder, use_rslora=True, rank=4, alpha=3)
    opened = open_folder(folder)
    write_model(opened, tmp_path / "model.gguf", kind="f32")
    write_adapter(read_adapter(adapter), opened, tmp_path / "adapter.gguf")
    wanted, plain = reference(folder, adapter), reference(folder)
    found = logits(tmp_path / "model.gguf", lora_path=str(tmp_path / "adapter.gguf"))
    assert np.abs(wanted - plain).max() > 10 * bound(family, wanted)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound(family, wanted))


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_greedy_text_is_ours(name, stored_model, tmp_path):
    """Plain, with the adapter fused, and with the adapter apart; llama.cpp cuts the prompts itself."""
    base = stored_model(name)
    adapter = save_adapter(tmp_path / "adapter", base, size=0.02)
    fused = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "fused")).output
    for folder, file in ((base, "base"), (fused, "fused")):
        write_model(open_folder(folder), tmp_path / f"{file}.gguf", kind="f32")
    write_adapter(read_adapter(adapter), open_folder(base), tmp_path / "adapter.gguf")
    plain = open_session(str(base), adapter=None, backend="torch", dtype="float32")
    adapted = open_session(str(base), adapter=str(adapter), backend="torch", dtype="float32")
    models = (
        (plain, load(tmp_path / "base.gguf")),
        (adapted, load(tmp_path / "fused.gguf")),
        (adapted, load(tmp_path / "base.gguf", lora_path=str(tmp_path / "adapter.gguf"))),
    )
    texts = []
    for prompt in PROMPTS:
        for session, model in models:
            ids = prompt_ids(session, prompt, chat=None)
            assert model.tokenize(prompt.encode()) == ids
            sampling = sampling_for(session, max_tokens=100, temperature=0.0, seed=0)
            ours = complete(session, ids, sampling).text
            theirs = model.create_completion(prompt, max_tokens=100, temperature=0.0)["choices"][0]["text"]
            assert ours.strip() == theirs.strip(), prompt  # our decoder takes the first blank away
            texts.append(ours)
        assert texts[-3] != texts[-2]
        assert texts[-2] == texts[-1]


def test_text_is_cut_as_the_tokenizer_cuts_it(stored_model, tmp_path):
    rows = (stored_model("stories260K").parent.parent / "data/wikisql/test.jsonl").read_text().splitlines()
    folders = {"spm": stored_model("stories260K"), "gpt-2": save_family(tmp_path / "model", "qwen2")}
    for name, folder in folders.items():
        write_model(open_folder(folder), tmp_path / f"{name}.gguf", kind="f32")
        model, tokenizer = load(tmp_path / f"{name}.gguf"), load_tokenizer(folder)
        for text in [*rows[:40], "naïve  café\n\n\ttab 12345 它", "<|im_end|> hello ?w"]:
            assert model.tokenize(text.encode(), special=True) == tokenizer.encode(text), text
