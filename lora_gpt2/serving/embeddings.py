"""OpenAI's embeddings: the mean of the last hidden states of each input, under the base or any model."""

from __future__ import annotations

import base64
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lora_gpt2.inference.session import Session
from lora_gpt2.serving.answers import ApiError
from lora_gpt2.serving.protocol import describe_invalid, encode_prompt, list_prompts, parse_json

MAX_INPUTS = 2048


class EmbeddingsBody(BaseModel):
    """The body of an embeddings request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=2000)
    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


def parse_embeddings(content: bytes, session: Session) -> tuple[EmbeddingsBody, list[list[int]]]:
    """Returns an embeddings request and the token ids of its inputs; raises `ApiError` that names the parameter."""
    try:
        body = EmbeddingsBody.model_validate(parse_json(content))
    except ValidationError as error:
        raise describe_invalid(error, EmbeddingsBody) from error
    width, context = session.base.config.n_embd, session.base.config.n_positions
    if body.dimensions not in (None, width):
        raise ApiError(400, f"an embedding has {width} dimensions", "dimensions")
    inputs = list_prompts(body.input, "input")
    if len(inputs) > MAX_INPUTS:
        raise ApiError(400, f"{len(inputs)} inputs, at most {MAX_INPUTS} are allowed", "input")
    texts = [encode_prompt(item, session.base.tokenizer, "input") for item in inputs]
    if too_long := next((ids for ids in texts if len(ids) > context), None):
        text = f"an input has {len(too_long)} tokens, the context is {context}"
        raise ApiError(400, text, "input", "context_length_exceeded")
    return body, texts


def build_embeddings(body: EmbeddingsBody, texts: list[list[int]], vectors: Tensor) -> dict[str, Any]:
    """Returns the response; `vectors` are `[inputs, width]`."""

    def show(vector: Tensor) -> Any:
        if body.encoding_format != "base64":
            return vector.tolist()
        return base64.b64encode(vector.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()).decode()

    used = sum(map(len, texts))
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": show(v)} for index, v in enumerate(vectors)],
        "model": body.model,
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }
