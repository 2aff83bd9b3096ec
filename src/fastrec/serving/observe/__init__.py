"""Metrics, traces and the status page, from the core's events."""
