"""Cleaning rules and filters: from a document to its clean text, or the reason why it is rejected."""
