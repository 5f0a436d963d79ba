"""Errors, console, names, folders, files, locks and fingerprints; imports no other package of ours, and never torch."""
