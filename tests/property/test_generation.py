"""Filtered distributions are those of a plain float64 reference and of transformers; text comes whole."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared.generation.answers import HALF, Answer, certain
from shared.generation.sampling import penalize, pick, shape
from shared.types import Sampling, Token

VOCABULARY = 40
LOGITS = arrays.arrays(np.float32, VOCABULARY, elements=st.floats(-30, 30, width=32), unique=True)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.9]),
    seed=st.integers(0, 9),
    stop_tokens=st.just(()),
    top_k=st.sampled_from([0, 1, 3, 17, VOCABULARY, 10 * VOCABULARY]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.1, 0.8, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.3, 4.0]),
)
SEEN = st.sets(st.integers(0, VOCABULARY - 1), min_size=1)


def reference(logits, sampling, seen):
    """Return the probabilities by the definitions, token after token, in float64."""
    z = [float(x) for x in logits]
    for token in seen:
        z[token] = z[token] * sampling.repetition_penalty if z[token] < 0 else z[token] / sampling.repetition_penalty
    p = [np.exp((x - max(z)) / sampling.temperature) for x in z]
    order = sorted(range(len(z)), key=lambda token: -z[token])[: sampling.top_k or None]
    total, before, kept = sum(p[token] for token in order), 0.0, []
    for token in order:
        if not kept or before / total < sampling.top_p:
            kept.append(token)
        before += p[token]
    result = np.zeros(len(z))
    for token in kept:
        result[token] = p[token] if p[token] >= sampling.min_p * p[order[0]] else 0.0
    return result / result.sum()


@cache
def owner():
    """Return a model of transformers, which makes the list of processors; what it computes plays no part."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def of_transformers(logits, sampling, seen):
    """Return the probabilities by transformers' processors, in the order in which its `generate` has them."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
        min_p=sampling.min_p, repetition_penalty=sampling.repetition_penalty,
    )  # fmt: skip
    chain = owner()._get_logits_processor(config, input_ids_seq_length=1)
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    return chain(torch.tensor([sorted(seen)]), scores).softmax(-1)[0].numpy()


@settings(max_examples=20)
@given(LOGITS, SAMPLINGS, SEEN)
def test_the_distribution_is_that_of_the_definitions_and_of_transformers(logits, sampling, seen):
    check_distribution(logits, sampling, seen)


@pytest.mark.slow
@settings(max_examples=300)
@given(LOGITS, SAMPLINGS, SEEN)
def test_many_distributions_are_those_of_the_definitions_and_of_transformers(logits, sampling, seen):
    check_distribution(logits, sampling, seen)


def check_distribution(logits, sampling, seen):
    wide = logits.astype(np.float64)
    assume(len(set(penalize(wide, seen, penalty=sampling.repetition_penalty))) == VOCABULARY)  # of equals any may go
    scores = shape(wide, sampling, seen=seen)
    found = np.exp(scores - scores.max())
    found /= found.sum()
    assert np.array_equal(wide, logits), "the logits given are left alone"
    np.testing.assert_allclose(found, reference(logits, sampling, seen), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found, of_transformers(logits, sampling, seen), rtol=0, atol=1e-6)


@given(LOGITS, SAMPLINGS, SEEN, st.integers(0, 50))
def test_what_is_drawn_is_never_filtered_out_and_always_the_same(logits, sampling, seen, n):
    drawn = pick(logits, sampling, prompt=3, n=n, seen=seen)
    assert drawn == pick(logits, sampling, prompt=3, n=n, seen=seen)
    assert np.isfinite(shape(logits.astype(np.float64), sampling, seen=seen)[drawn[0]])


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=2, max_size=12), SAMPLINGS)
def test_of_equal_tokens_all_stay_or_none(logits, sampling):
    scores = shape(np.array(logits), sampling)
    for value in set(logits):
        assert len({np.isfinite(score) for score, logit in zip(scores, logits, strict=True) if logit == value}) == 1


def test_filtered_draws_are_distributed_as_what_is_left():
    logits, number = np.float32([2.0, 1.5, 1.0, 0.0, -1.0]), 5_000
    sampling = Sampling(1, 1.0, 0, (), top_k=4, top_p=0.9)
    wanted = reference(logits, sampling, ())
    drawn = [pick(logits, sampling, prompt=0, n=n)[0] for n in range(number)]
    gap = np.abs(np.bincount(drawn, minlength=5) / number - wanted)
    assert (gap <= 4.5 * np.sqrt(wanted * (1 - wanted) / number)).all()  # 4.5 standard deviations


# Text: tokens are bytes, so that characters and stop strings straddle them.


def decode(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def say(data, stops, *, more=1):
    """Return the pieces shown and the finished answer of a model that says these bytes."""
    answer = Answer(decode, Sampling(len(data) + more, 0.0, 0, (), stop_strings=stops), prompt_tokens=1)
    pieces = []
    for n, byte in enumerate([*data, 256][: len(data) + more]):
        pieces.append(answer.take(Token(prompt=0, token=byte, log_prob=-1.0, stopped=n == len(data))))
        if answer.finish_reason:
            break
    return pieces, answer.completion()


TEXTS = st.text(alphabet="ab\n é漢🙂", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n é🙂", min_size=1, max_size=4), max_size=3).map(tuple)


@given(TEXTS, STOPS)
def test_pieces_are_the_text_up_to_the_first_stop_string_without_half_a_character(text, stops):
    pieces, found = say(text.encode(), stops)
    assert "".join(pieces) == found.text
    assert HALF not in found.text
    assert not [stop for stop in stops if stop in found.text]
    assert text.startswith(found.text)
    if found.finish_reason == "stop_string":
        assert text.startswith(found.text + found.stop_string)
    else:
        assert (found.text, found.finish_reason, found.stopped) == (text, "stop", True)


@given(TEXTS, STOPS)
def test_only_what_could_still_become_a_stop_string_is_held_back(text, stops):
    held = text[certain(text, stops) :]
    assert not held or any(stop.startswith(held) and stop != held for stop in stops) or any(s in text for s in stops)


def test_half_a_character_that_the_limit_leaves_is_shown_as_what_the_tokenizer_makes_of_it():
    pieces, found = say("café".encode()[:-1], (), more=0)
    assert (found.finish_reason, found.text, "".join(pieces)) == ("length", f"caf{HALF}", f"caf{HALF}")
    assert pieces[:-1] == ["c", "a", "f"]


def test_of_stop_strings_that_end_together_the_one_that_begins_first_counts():
    found = say(b"one two", ("two", " two", "wo"))[1]
    assert (found.text, found.stop_string) == ("one", " two")
