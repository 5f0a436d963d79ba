"""The adapter store: immutable versions in PEFT's format, each with its origin and figures."""
