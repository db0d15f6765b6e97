"""Settings of a generation and their defaults: what `generate` and `chat` take beside a run's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from shared.errors import ConfigError, did_you_mean
from shared.problems import describe
from shared.sections import Count, Name, NotNegative, Positive, Section, Share


class GenerationConfig(Section):
    max_tokens: Annotated[Count, Field(description="tokens of an answer, at most")] = 128
    temperature: Annotated[NotNegative, Field(description="0: the likeliest token each time")] = 0.0
    top_k: Annotated[int, Field(ge=0, strict=True, description="only the K likeliest tokens; 0: all")] = 0
    top_p: Annotated[Share, Field(gt=0, description="only the likeliest tokens that sum to this probability")] = 1.0
    min_p: Annotated[Share, Field(description="only tokens with this share of the likeliest one's probability")] = 0.0
    repetition_penalty: Annotated[
        Positive, Field(description="above 1: tokens that the text has already are less likely")
    ] = 1.0
    stop: Annotated[tuple[Name, ...], Field(description="texts that end an answer and are not part of it")] = ()
    seed: Annotated[int, Field(ge=0, lt=2**64, strict=True)] = 0
    batch_size: Annotated[Count, Field(description="prompts computed together, at most")] = 8


CHAT: dict[str, Any] = {"max_tokens": 1024, "temperature": 0.7, "top_p": 0.95}  # defaults of a chat that are its own
WITHOUT_EFFECT = ("top_k", "top_p", "min_p")  # at temperature 0


def chat_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a chat: its own defaults stand for what is not given, or None."""
    return {**values, **{key: value for key, value in CHAT.items() if values.get(key) is None}}


def read_settings(values: dict[str, Any]) -> GenerationConfig:
    """Return checked settings; None is a default. Raises ConfigError with the first problem."""
    given = {key: value for key, value in values.items() if value is not None}
    for key in given.keys() - GenerationConfig.model_fields.keys():
        raise ConfigError(
            f'generation: unknown setting "{key}"', code="E201", fix=did_you_mean(key, GenerationConfig.model_fields)
        )
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    try:
        return GenerationConfig.model_validate(given)
    except ValidationError as error:
        raise describe(GenerationConfig, error, place="generation", places={}) from None
