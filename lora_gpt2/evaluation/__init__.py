"""Numbers to trust: perplexity, and the matrix of adapters and domains."""

from lora_gpt2.core.memory import TORCH_BYTES, check_address_space

check_address_space(TORCH_BYTES)  # before torch is loaded, which would abort
