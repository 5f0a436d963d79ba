"""The Python API: the functions and classes that `lora_gpt2` exports, each one call of the domain below it."""
