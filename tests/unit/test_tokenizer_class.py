"""Where we choose a tokenizer's class ourselves, it is AutoTokenizer's choice, and the tokens are the same."""

from __future__ import annotations

import json

import pytest

from shared.data.tokenizer_class import CHOICES, known_class
from tests.conftest import save_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "phi3")
DECLARED = (
    "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer",
    "Qwen2TokenizerFast", "GPT2Tokenizer", None,
)  # fmt: skip
TEXTS = ("hello world", " two  blanks", "naïve 🦊\n\n<|im_end|>x", "")


def change(file, **values):
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, **values}))


def save_sentencepiece(folder):
    """Write a tokenizer in the manner of Llama 2: blanks are part of the pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"helowrd", "he", "ll", "▁w"]
    merges = [("h", "e"), ("l", "l"), ("▁", "w")]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    outer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a byte-level tokenizer's folder and a SentencePiece-like one."""
    return {
        "bytes": save_tokenizer(tmp_path_factory.mktemp("bytes")),
        "pieces": save_sentencepiece(tmp_path_factory.mktemp("pieces")),
    }


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("declared", DECLARED)
def test_the_class_and_its_tokens_are_those_of_auto_tokenizer(folders, tmp_path, kind, family, declared):
    from transformers import AutoTokenizer

    for file in folders[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path / "config.json", model_type=family)
    change(tmp_path / "tokenizer_config.json", tokenizer_class=declared)
    found = known_class(tmp_path)
    assert (found is None) == ((family, str(declared).removesuffix("Fast")) not in CHOICES)
    if found is None:
        return
    ours = found.from_pretrained(str(tmp_path), local_files_only=True)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    assert [ours(text)["input_ids"] for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]


def test_folders_with_code_or_another_format_go_to_auto_tokenizer(folders, tmp_path):
    for file in folders["bytes"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path / "config.json", model_type="llama")
    assert known_class(tmp_path) is not None
    (tmp_path / "tekken.json").touch()
    assert known_class(tmp_path) is None
    (tmp_path / "tekken.json").unlink()
    change(tmp_path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]})
    assert known_class(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert known_class(tmp_path) is None
