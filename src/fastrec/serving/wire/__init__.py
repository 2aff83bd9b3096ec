"""The protocols that requests arrive in: gRPC, and HTTP for REST, metrics and the status page."""

from fastrec import env

env.silence_grpc()
