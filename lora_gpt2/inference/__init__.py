"""Continuing text with any adapter or mix of adapters, over one base that is loaded once."""

from lora_gpt2.core.memory import TORCH_BYTES, check_address_space

check_address_space(TORCH_BYTES)  # before torch is loaded, which would abort
