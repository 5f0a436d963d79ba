"""A few words from an adapter while it learns: the part of a report that people read first."""

from __future__ import annotations

from lora_gpt2.inference.generate import Request, generate
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import Base
from lora_gpt2.model.lora import Adapter
from lora_gpt2.training.slot import TrainingSlot

PROMPT_TOKENS = 8


def generate_sample(base: Base, slot: TrainingSlot, adapter: Adapter) -> str:
    """Returns the prompt and its continuation, with the recipe's sampling settings and seed; "" if not wanted."""
    settings = slot.recipe.train
    if not settings.sample_tokens:
        return ""
    session = Session(base)
    session.load_in_memory({slot.name: adapter})
    prompt = settings.sample_prompt or _find_prompt(base, slot)
    room = base.config.n_positions - 1 - len(base.tokenizer.encode(prompt))
    if room < 1:
        return ""
    limits = slot.recipe.generate.model_copy(update={"max_new_tokens": min(settings.sample_tokens, room)})
    (output,) = generate(session, [Request(prompt, Mix.single(slot.name), settings.seed)], limits)
    return prompt + output.text


def _find_prompt(base: Base, slot: TrainingSlot) -> str:
    """Returns the beginning of the first validation document."""
    stream = slot.data.validation.stream[1 : 1 + PROMPT_TOKENS].tolist()
    end = stream.index(base.tokenizer.eos_id) if base.tokenizer.eos_id in stream else len(stream)
    return base.tokenizer.decode(stream[: max(1, end)])
