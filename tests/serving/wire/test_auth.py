"""Tokens, certificates and TLS; what of a tier's claim is believed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
from wire_client import arrays, inputs, tritonclient

from fastrec.errors import ArgumentError
from fastrec.serving.wire.auth import ANYONE, Auth, Identity, new_token, settle
from fastrec.serving.wire.request_handler import is_loopback
from fastrec.serving.wire.request_parameters import RequestParameters
from fastrec.serving.wire.status import Refused
from fastrec.serving.wire.tls import Tls

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """An authority, a server's and a client's certificate, and a client's of another authority."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command, which makes the test's certificates, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    for authority in ("ca", "other"):
        openssl(
            folder,
            *("req", "-x509", *NEW_KEY, "-days", "2", "-keyout", f"{authority}.key"),
            *("-out", f"{authority}.pem", "-subj", f"/CN={authority}"),
        )
    for name, authority, extension in (
        ("server", "ca", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
        ("client", "ca", "subjectAltName=DNS:deploy.example.org"),
        ("stranger", "other", "subjectAltName=DNS:deploy.example.org"),
    ):
        openssl(
            folder,
            *(
                "req",
                *NEW_KEY,
                "-keyout",
                f"{name}.key",
                "-out",
                f"{name}.csr",
                "-subj",
                f"/CN={name}",
            ),
        )
        (folder / f"{name}.ext").write_text(extension)
        openssl(
            folder,
            *("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem"),
            *("-CAkey", f"{authority}.key", "-CAcreateserial", "-days", "2"),
            *("-extfile", f"{name}.ext", "-out", f"{name}.pem"),
        )
    return folder


TOKEN, DIGEST = new_token()
PLAIN_TOKEN, PLAIN_DIGEST = new_token()
ENTRIES = [
    {"name": "shop-front", "token_sha256": DIGEST, "tenant": "shop", "tiers": ["gold", "bulk"]},
    {"name": "plain", "token_sha256": PLAIN_DIGEST},
    {"name": "deploy", "certificate": "deploy.example.org", "admin": True, "tiers": ["bulk"]},
]


def client(url, token=None, **settings):
    made = tritonclient.InferenceServerClient(url, **settings)
    if token is not None:
        infer = made.infer
        made.infer = lambda *a, headers=None, **k: infer(
            *a, headers={"authorization": f"Bearer {token}", **(headers or {})}, **k
        )
    return made


def test_without_a_valid_token_nothing_is_told_but_health(served):
    url = served.start(auth=Auth.of(ENTRIES))
    for token in (None, "wrong", "", "é" * 10):
        with client(url, token and token.encode("latin1", "ignore").decode("ascii", "ignore")) as c:
            assert c.is_server_ready()
            with pytest.raises(tritonclient.InferenceServerException, match="UNAUTHENTICATED"):
                c.infer("ranker", inputs(arrays()))
            with pytest.raises(tritonclient.InferenceServerException, match="UNAUTHENTICATED"):
                c.get_model_metadata("ranker")
    assert served.core.requests == []


def test_tier_and_tenant_come_from_the_identity(served):
    with client(served.start(auth=Auth.of(ENTRIES)), TOKEN) as c:
        c.infer("ranker", inputs(arrays()))
        c.infer("ranker", inputs(arrays()), parameters={"tier": "bulk", "tenant": "shop"})
        for claim in ({"tier": "platinum"}, {"tenant": "blog"}):
            with pytest.raises(tritonclient.InferenceServerException, match="PERMISSION_DENIED"):
                c.infer("ranker", inputs(arrays()), parameters=claim)
        with pytest.raises(tritonclient.InferenceServerException, match="PERMISSION_DENIED"):
            c.infer("ranker", inputs(arrays()), headers={"fastrec-tier": "platinum"})
    assert [(r.tier, r.tenant) for r in served.core.requests] == [
        ("gold", "shop"),
        ("bulk", "shop"),
    ]


def test_an_identity_that_is_no_admin_loads_nothing(served):
    with client(served.start(auth=Auth.of(ENTRIES))) as c:
        with pytest.raises(tritonclient.InferenceServerException, match="PERMISSION_DENIED"):
            c.load_model("other", headers={"authorization": f"Bearer {TOKEN}"})
        with pytest.raises(tritonclient.InferenceServerException, match="UNAUTHENTICATED"):
            c.load_model("other")
    assert served.repository.calls == []


def test_tls(served, certificates):
    tls = Tls(certificates / "server.key", certificates / "server.pem")
    url = served.start(tls=tls)
    with client(url, ssl=True, root_certificates=str(certificates / "ca.pem")) as c:
        assert c.infer("ranker", inputs(arrays())).as_numpy("scores").shape == (2, 5)
    refused = pytest.raises(tritonclient.InferenceServerException)
    with client(url, ssl=True, root_certificates=str(certificates / "other.pem")) as c, refused:
        c.infer("ranker", inputs(arrays()), client_timeout=5)
    with client(url) as c, pytest.raises(tritonclient.InferenceServerException):
        c.infer("ranker", inputs(arrays()), client_timeout=5)


def test_mutual_tls_names_the_caller(served, certificates):
    tls = Tls(certificates / "server.key", certificates / "server.pem", certificates / "ca.pem")
    url = served.start(tls=tls, auth=Auth.of(ENTRIES))

    def connect(name):
        return client(
            url,
            ssl=True,
            root_certificates=str(certificates / "ca.pem"),
            private_key=name and str(certificates / f"{name}.key"),
            certificate_chain=name and str(certificates / f"{name}.pem"),
        )

    with connect("client") as c:
        c.infer("ranker", inputs(arrays()))
        c.load_model("other")
    assert [(r.tier, r.tenant) for r in served.core.requests] == [("bulk", "deploy")]
    assert served.repository.calls == [("load", "other")]
    for name in ("stranger", None):
        with connect(name) as c, pytest.raises(tritonclient.InferenceServerException):
            c.infer("ranker", inputs(arrays()), client_timeout=5)


def test_a_token_beats_no_certificate_and_is_not_mixed_with_one():
    auth = Auth.of(ENTRIES)
    assert auth.by_certificate
    assert auth.identify(f"bearer {TOKEN}", ()).name == "shop-front"
    assert auth.identify(None, ["x", "deploy.example.org"]).name == "deploy"
    for header, names in (("Basic abc", ["deploy.example.org"]), (None, ["x"]), ("Bearer", ())):
        with pytest.raises(Refused) as caught:
            auth.identify(header, names)
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_claims():
    assert settle(ANYONE, RequestParameters(tier="gold", tenant="t")) == ("gold", "t")
    assert settle(Identity("plain"), RequestParameters()) == ("", "plain")
    with pytest.raises(Refused, match="does not hold the tier"):
        settle(Identity("plain"), RequestParameters(tier="gold"))


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"name": "a"}, "token_sha256 or certificate"),
        ({"token_sha256": DIGEST}, "a name in each"),
        ({"name": "a", "token_sha256": "secret"}, "64 hexadecimal digits"),
        ({"name": "a", "token_sha256": DIGEST, "tier": "gold"}, "keys among"),
        ({"name": "a", "token_sha256": DIGEST, "tiers": "gold"}, "a list of names"),
        ({"name": "a", "token_sha256": DIGEST, "admin": "yes"}, "true or false"),
        ({"name": "a", "certificate": 5}, "text"),
        ("a", "objects"),
    ],
)
def test_wrong_entries(tmp_path, entry, text):
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"identities": [entry]}))
    with pytest.raises(ArgumentError, match=text) as caught:
        Auth.read(path)
    assert "secret" not in str(caught.value)


def test_wrong_files(tmp_path):
    path = tmp_path / "auth.json"
    for text in ("", "[]", '{"identities": []}', '{"identities": 5}', "{"):
        path.write_text(text)
        with pytest.raises(ArgumentError):
            Auth.read(path)
    with pytest.raises(ArgumentError, match="auth"):
        Auth.read(tmp_path / "none")
    twice = [{"name": n, "token_sha256": DIGEST} for n in "ab"]
    with pytest.raises(ArgumentError, match="one identity a proof"):
        Auth.of(twice)


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:5000", True),
        ("ipv4:10.0.0.1:5000", False),
        ("ipv6:%5B::1%5D:5000", True),
        ("ipv6:[::1]:5000", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:80", True),
        ("ipv6:%5B2001:db8::1%5D:80", False),
        ("unix:/tmp/socket", True),
        ("ipv4:", False),
        ("", False),
        ("vsock:1:2", False),
    ],
)
def test_loopback(peer, local):
    assert is_loopback(peer) is local
