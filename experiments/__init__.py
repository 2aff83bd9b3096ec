"""Experiments on recommendation quality: one command each, results in docs/results."""
