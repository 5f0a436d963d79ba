"""Combining adapters and writing them into the base; every result is measured against what it was made from."""

from lora_gpt2.core.memory import TORCH_BYTES, check_address_space

check_address_space(TORCH_BYTES)  # before torch is loaded, which would abort
