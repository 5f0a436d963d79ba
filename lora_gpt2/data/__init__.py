"""From files to blocks of tokens; nothing here but `tokenizer` knows a model, and nothing imports torch."""

from lora_gpt2.core.memory import NUMPY_BYTES, check_address_space

check_address_space(NUMPY_BYTES)  # before NumPy is loaded, which would end the process
