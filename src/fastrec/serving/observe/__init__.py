"""What a server tells about itself, from the core's events: metrics, traces, status page."""
