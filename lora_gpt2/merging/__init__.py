"""Combining adapters and writing them into the base; every result is measured against what it was made from."""
