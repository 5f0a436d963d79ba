"""Risks in a text or an adapter: memorization, PII, copies, licences, watermarks."""

from lora_gpt2.core.memory import TORCH_BYTES, check_address_space

check_address_space(TORCH_BYTES)  # before torch is loaded, which would abort
