"""Training K >= 1 adapters together over one frozen base."""

from lora_gpt2.core.memory import TORCH_BYTES, check_address_space

check_address_space(TORCH_BYTES)  # before torch is loaded, which would abort
