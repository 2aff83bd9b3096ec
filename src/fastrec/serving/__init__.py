"""Serving: admission, queues, batching, routing and warm pools around engines. No torch here."""
