"""Continuing text with any adapter or mix of adapters, over one base that is loaded once."""
