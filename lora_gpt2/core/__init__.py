"""What everything stands on: errors, console, fingerprints, paths. Imports nothing of ours, and never torch."""
