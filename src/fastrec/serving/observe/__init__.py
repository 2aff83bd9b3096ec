"""What a server tells about itself, from the runtime's events: metrics, traces, status page."""
