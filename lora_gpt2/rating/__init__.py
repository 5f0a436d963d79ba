"""Blind comparison of adapters by people: rounds, answers, agreement and ranking; never imports torch."""
