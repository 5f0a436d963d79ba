"""Training K >= 1 adapters together over one frozen base."""
