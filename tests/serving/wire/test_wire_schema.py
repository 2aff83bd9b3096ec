"""The schema is Triton's as far as it goes, and stays out of protobuf's default pool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("google.protobuf", reason="fastrec-kernels[serve] is not installed")

from fastrec.serving.wire import messages


def walk(descriptor):
    yield descriptor
    for nested in descriptor.nested_types:
        yield from walk(nested)


def ours():
    file = messages.pool.FindFileByName("inference.proto")
    for top in file.message_types_by_name.values():
        yield from walk(top)


def test_every_field_is_tritons():
    pb2 = pytest.importorskip("tritonclient.grpc.service_pb2", reason="no tritonclient")
    config = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="no tritonclient")
    theirs = {
        m.full_name: m
        for file in (pb2.DESCRIPTOR, config.DESCRIPTOR)
        for top in file.message_types_by_name.values()
        for m in walk(top)
    }
    for own in ours():
        other = theirs[own.full_name]
        for field in own.fields:
            twin = other.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (
                twin.number,
                twin.type,
                twin.is_repeated,
            ), field.full_name
            if field.message_type:
                assert field.message_type.full_name == twin.message_type.full_name
            if field.enum_type:
                values = {v.name: v.number for v in twin.enum_type.values}
                assert {v.name: v.number for v in field.enum_type.values} == values


def test_methods_are_tritons():
    pb2 = pytest.importorskip("tritonclient.grpc.service_pb2", reason="no tritonclient")
    theirs = pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for name, (request, reply) in messages.methods(messages.SERVICE).items():
        assert request.DESCRIPTOR.full_name == theirs[name].input_type.full_name
        assert reply.DESCRIPTOR.full_name == theirs[name].output_type.full_name


def test_the_descriptor_set_is_the_one_of_the_proto_files(tmp_path):
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    folder = messages.SCHEMA.parent
    out = tmp_path / "schema.binpb"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", "--include_imports"),
            f"--descriptor_set_out={out}",
            *sorted(map(str, folder.glob("*.proto"))),
        ],
        check=True,
    )
    assert out.read_bytes() == messages.SCHEMA.read_bytes(), "run `make protos`"


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_tritonclient_lives_in_the_same_process(order):
    pytest.importorskip("tritonclient.grpc", reason="no tritonclient")
    imports = ["import fastrec.serving.wire.messages", "import tritonclient.grpc"]
    code = "\n".join(imports if order == "ours first" else reversed(imports))
    code += "\nfrom google.protobuf import descriptor_pool as d"
    code += "\nassert fastrec.serving.wire.messages.pool is not d.Default()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_field_has_a_type_that_proto3_readers_know():
    assert Path(messages.SCHEMA).stat().st_size < 32_768
    assert {m.full_name for m in ours()} >= {"inference.ModelInferRequest", "inference.ModelConfig"}
