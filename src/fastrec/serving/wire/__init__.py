"""The protocols that requests arrive in: gRPC, and HTTP for REST, metrics and the status page."""
