"""The tour that `lora-gpt2 demo` gives: train three adapters, swap them, measure them."""

from lora_gpt2.core.memory import TORCH_BYTES, check_address_space

check_address_space(TORCH_BYTES)  # before torch is loaded, which would abort
