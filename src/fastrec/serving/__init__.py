"""Serving: admission, lanes, batching, routing and warm pools around engines. No torch here."""
