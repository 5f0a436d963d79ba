"""Runs the command line as `python -m lora_gpt2`."""

from lora_gpt2.cli import main

main()
