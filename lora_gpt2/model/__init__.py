"""The network and the maths of adapters: GPT-2, LoRA, the bank, the loss, finding and loading bases."""
