"""Hosts, keys, certificates, proxies: what may be reached, and what may never be shown."""

import asyncio
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading

import pytest

from data_gen.budget import Budget
from data_gen.config import NetworkSettings, Role, load_config
from data_gen.endpoints import open_network, open_roles, read_secrets
from data_gen.journal import Journal
from data_gen.network import Network, go_offline, is_loopback, read_key_file
from data_gen.teacher import Patience, Teacher, TeacherFailed
from data_gen.transport import open_wire

MESSAGES = [{"role": "user", "content": "q"}]
KEY = "sk-very-secret-key"


def ask(folder, role: Role, network: Network | None = None):
    """Ask once as a role's settings say."""

    async def run():
        with open_roles({"reasoner": role}) as endpoints:
            journal = Journal(folder / "journal.sqlite")
            try:
                async with open_wire(network) as wire:
                    patience = Patience(1, 0.01, 0.01)
                    teacher = Teacher(endpoints["reasoner"], wire, journal, Budget(4), patience)
                    return await teacher.ask(MESSAGES)
            finally:
                await journal.drain()
                journal.close()

    return asyncio.run(run())


def role(url: str, **fields) -> Role:
    return Role.model_validate({"base_url": url, "model": "m", "timeout": 5, **fields})


# --- hosts ------------------------------------------------------------------------------------


def test_a_host_that_is_not_allowed_is_refused_before_a_connection(serve, tmp_path):
    server = serve(lambda body, n: "hello")
    allowed = Network(allow=("teacher.example",))
    with pytest.raises(ValueError, match=r"network.allow does not hold the host 127.0.0.1"):
        ask(tmp_path, role(server.base_url), allowed)
    assert server.requests == []
    assert ask(tmp_path, role(server.base_url), Network(allow=("127.0.0.1",))).answer == "hello"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"allow": ["a.example"]}, "add it to reach it"),
        ({"offline": True}, "offline allows only this machine"),
        ({"allow": ["b.example"], "proxy": "http://proxy.example:1"}, "proxy.example"),
    ],
)
def test_every_endpoint_is_checked_before_any_is_asked(settings, words):
    settings = NetworkSettings.model_validate(settings)
    with pytest.raises(ValueError, match=words):
        open_network(settings, [role("https://b.example/v1")])


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("0x7f000001.example", False),
        ("10.0.0.1", False),
        ("teacher", False),
    ],
)
def test_only_this_machine_is_loopback(host, is_here):
    assert is_loopback(host) is is_here


def test_offline_tells_the_hub_libraries(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    go_offline()
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name)
    for name in ("TRANSFORMERS_OFFLINE", "DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name)


# --- what is sent -----------------------------------------------------------------------------


def test_key_headers_and_api_version_are_sent(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("TEAM", "blue")
    server = serve(lambda body, n: "hello")
    settings = {"headers": {"X-Purpose": "data"}, "headers_env": {"X-Team": "TEAM"}}
    settings |= {"api_version": "2026-01", "api_key_env": "TEACHER_KEY"}
    ask(tmp_path, role(server.base_url, **settings))
    sent = server.headers[0]
    assert sent["Authorization"] == f"Bearer {KEY}"
    assert (sent["X-Purpose"], sent["X-Team"]) == ("data", "blue")
    assert server.paths[0] == "/v1/chat/completions?api-version=2026-01"
    ask(tmp_path / "other", role(server.base_url, api_key_header="api-key", **settings))
    assert server.headers[1]["api-key"] == KEY and "Authorization" not in server.headers[1]


def test_a_proxy_is_used_and_only_the_one_that_is_configured(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("LOGIN", "me:pass word")
    proxy = serve(lambda body, n: "through the proxy")
    settings = NetworkSettings(proxy=proxy.base_url.removesuffix("/v1"), proxy_env="LOGIN")
    place = role("http://teacher.invalid/v1")
    assert ask(tmp_path, place, open_network(settings, [place])).answer == "through the proxy"
    assert proxy.paths == ["http://teacher.invalid/v1/chat/completions"]
    assert proxy.headers[0]["Proxy-Authorization"].startswith("Basic ")


def test_a_server_whose_certificate_is_not_trusted_is_refused(tmp_path):
    """A TLS handshake against a server that speaks none fails; nothing of the request is sent."""
    received = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            connection, _ = listener.accept()
            received.append(connection.recv(4096))
            connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        with pytest.raises(TeacherFailed):
            ask(tmp_path, role(f"https://127.0.0.1:{listener.getsockname()[1]}/v1"))
        thread.join()
    assert received and b"chat/completions" not in received[0]


@pytest.mark.parametrize("name", ["ca_bundle", "client_certificate"])
def test_a_certificate_that_cannot_be_used_is_named(tmp_path, name):
    path = tmp_path / "x.pem"
    path.write_text("no certificate")
    with pytest.raises(ValueError, match=f"network.{name}={path}"):
        Network(**{name: path}).tls()
    with pytest.raises(ValueError, match="No such file"):
        Network(**{name: tmp_path / "none.pem"}).tls()


# --- keys -------------------------------------------------------------------------------------


def test_a_key_file_must_be_its_owners_alone(tmp_path):
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    assert read_key_file(path) == KEY
    assert read_secrets(role("http://x/v1", api_key_file=path)) == {
        "Authorization": f"Bearer {KEY}"
    }
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(ValueError, match=f"mode {mode:o} lets others read it.*chmod 600"):
            read_key_file(path)
    path.chmod(0o600)
    path.write_text("two keys")
    with pytest.raises(ValueError, match="one key and nothing else") as caught:
        read_key_file(path)
    assert "two keys" not in str(caught.value)
    with pytest.raises(ValueError, match="No such file"):
        read_key_file(tmp_path / "none")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("teacher.reasoner.headers={Authorization: x}", ["headers_env", "Authorization"]),
        ("teacher.reasoner.headers={api-key: x}", ["headers_env"]),
        ("teacher.reasoner.base_url=https://user:secret@x/v1", ["base_url"]),
        (
            "teacher.reasoner={base_url: 'http://x', model: m, api_key_env: A, api_key_file: b}",
            ["api_key_env or api_key_file"],
        ),
        ("network.client_key=k.pem", ["client_key", "client_certificate"]),
        ("network.proxy_env=LOGIN", ["proxy_env", "without proxy"]),
    ],
)
def test_a_secret_cannot_stand_in_the_configuration(tmp_path, override, words):
    path = tmp_path / "c.yaml"
    path.write_text("{bank: b, out: o, teacher: {reasoner: {base_url: 'http://x/v1', model: m}}}")
    with pytest.raises(ValueError) as caught:
        load_config(path, [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_key_is_in_no_journal_and_no_message(serve, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    body = json.dumps({"error": {"message": f"wrong key {KEY} given", "code": None}})
    for status in (401, 400, 500):
        server = serve(lambda sent, n, status=status: (status, {}, body))
        with pytest.raises(TeacherFailed) as caught:
            ask(tmp_path, role(server.base_url, api_key_env="TEACHER_KEY"))
        assert KEY not in str(caught.value) and "***" in str(caught.value)
    good = serve(lambda sent, n: "hello")
    place = role(good.base_url, api_key_env="TEACHER_KEY")
    ask(tmp_path, place)
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes()
    with open_roles({"reasoner": place}) as endpoints:
        assert KEY not in repr(endpoints["reasoner"]) + repr(endpoints["reasoner"].address)
    assert KEY not in place.model_dump_json() + caplog.text


# --- TLS --------------------------------------------------------------------------------------


def make_certificate(folder, name: str, issuer: str | None = None):
    """A key and a certificate for 127.0.0.1, of its own or signed by another one."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(key)]
    command += ["-out", str(certificate), "-addext", "subjectAltName=IP:127.0.0.1"]
    if issuer is not None:
        command += ["-CA", str(folder / f"{issuer}.pem"), "-CAkey", str(folder / f"{issuer}.key")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return key, certificate


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_a_server_with_the_teams_own_authority_and_client_certificates_is_reached(serve, tmp_path):
    _, authority = make_certificate(tmp_path, "authority")
    key, certificate = make_certificate(tmp_path, "server", "authority")
    client_key, client = make_certificate(tmp_path, "client", "authority")
    server = serve(lambda body, n: "over TLS")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    server.secure(context)
    settings = {"ca_bundle": authority, "client_certificate": client, "client_key": client_key}
    place = role(server.base_url)
    assert ask(tmp_path / "whole", place, Network(**settings)).answer == "over TLS"
    for missing in settings:
        kept = {name: path for name, path in settings.items() if name != missing}
        with pytest.raises((TeacherFailed, ValueError)):
            ask(tmp_path / missing, place, Network(**kept))
    assert len(server.requests) == 1
