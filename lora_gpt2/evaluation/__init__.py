"""Numbers to trust: perplexity, and the matrix of adapters and domains."""
