"""Prompts continued together give the tokens and log-probabilities that each of them has alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.registry import BACKENDS, find_backend
from shared.types import Sampling
from tests import tolerances
from tests.parity.test_families import save
from tests.parity.test_packing import MODELS, OTHERS

LENGTHS = [5, 19, 1, 12, 12, 30]
FEW = ("llama llama3 rope", "gemma2, window, soft-cap", "smollm3")
WHOLE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}  # heads are turned whole
MOST = {**MODELS, **OTHERS, "no attention of ours": ("glm", {"head_dim": 16, "rope_parameters": WHOLE})}
# Of Gemma 3 and Cohere 2 mlx-lm keeps a window's keys only; its Gemma 2 takes no masks of several rows.
ONE_BY_ONE = {("mlx", name) for name in ("gemma3, window", "cohere2, window", "gemma2, window, soft-cap")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str, str], Path]:
    """Return a factory of model folders, each written once."""
    made: dict[str, Path] = {}

    def get(name: str, backend: str) -> Path:
        family, settings = MOST[name]
        if backend == "mlx" and family in ("gemma3_text", "cohere2"):  # mlx-lm wants a layer without a window
            settings = {**settings, "sliding_window": 48, "num_hidden_layers": 6}
        key = f"{name} {settings}"
        if key not in made:
            made[key] = save(tmp_path_factory.mktemp("model"), family, settings)
        return made[key]

    return get


def prompts_for(vocabulary):
    random = np.random.default_rng(5)
    made = [random.integers(0, vocabulary, length).tolist() for length in LENGTHS]
    return [*made, made[1]]  # one of them twice


def answers(model, prompts, sampling):
    """Return (token, log-probability, stopped) of every token by prompt."""
    found = [[] for _ in prompts]
    for token in model.generate(prompts, sampling):
        found[token.prompt].append((token.token, token.log_prob, token.stopped))
    return found


def check(backend, path, *, max_tokens=14):
    engine = find_backend(backend)
    model = engine.load_model(path, dtype="float32", quantization=None, recompute=False, device="cpu")
    prompts = prompts_for(model.info.vocab_size)
    stops = (3, 7, 11, 19, 23, 31, 43, 47)  # so that rows leave early and others join
    for temperature, top_p in ((0.0, 1.0), (1.5, 0.9)):
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": 4, "stop_tokens": stops}
        options |= {"top_p": top_p, "repetition_penalty": 1.3}
        alone = [answers(model, [prompt], Sampling(**options))[0] for prompt in prompts]
        together = answers(model, prompts, Sampling(**options, batch_size=3))
        for one, same in zip(alone[:-1], together[:-1], strict=True):
            assert [x[0] for x in one] == [x[0] for x in same]
            assert [x[2] for x in one] == [x[2] for x in same]
            np.testing.assert_allclose([x[1] for x in one], [x[1] for x in same], atol=tolerances.LOGITS)
        twins = [[token for token, *_ in together[n]] for n in (1, -1)]
        assert (twins[0] == twins[1]) == (temperature == 0), "equal prompts are drawn for independently"
    check_going_on(model, prompts)
    return model.info.can_batch


def check_going_on(model, prompts):
    """A prompt that begins as the last sequence did has the logits that it has alone."""
    rows, (start, other) = model.rows(width=1), (prompts[1], prompts[5])
    for prompt in (start, [*start, 5, 9, *other], [*start, 5, 8, *other], [*start, 5], other, other):
        found = [rows.add(prompt), rows.step([7])[0]]
        rows.keep([])
        alone = model.rows(width=1)
        np.testing.assert_allclose(found, [alone.add(prompt), alone.step([7])[0]], atol=tolerances.LOGITS, rtol=1e-5)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_gets_the_same_answer_alone_and_in_a_batch(backend, name, folder):
    assert check(backend, folder(name, backend)) == ((backend, name) not in ONE_BY_ONE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MOST if name not in FEW])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_gets_the_same_answer_alone_and_in_a_batch_in_every_other_family(backend, name, folder):
    assert check(backend, folder(name, backend)) == ((backend, name) not in ONE_BY_ONE)
