"""One frozen GPT-2, many small adapters: train, keep, swap, mix and measure them."""

__version__ = "0.1.0"
