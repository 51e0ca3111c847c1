"""Proxies and authorities: one setting that all clients of this machine follow."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest

from infra.network import network_environment
from infra.provision import Keys, provision
from infra.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROXY = "http://proxy.hospital.example:3128"
NAMES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "PREFECT_API_SSL_CERT_FILE")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("network") / "kits"
    kits = provision("bladder", Keys("f" * 64, {"a": "a" * 64, "b": "b" * 64}, quorum=2), out=out)
    return kits["a"] / "startup" / "rootCA.pem"


def test_without_settings_nothing_is_added() -> None:
    assert network_environment({"PATH": "/bin", "NO_PROXY": "intranet"}) == {}


@pytest.mark.parametrize("given", ["HTTPS_PROXY", "https_proxy"])
def test_each_library_finds_the_proxy_under_its_own_name(given: str) -> None:
    found = {given: PROXY, **network_environment({given: PROXY})}
    assert found["HTTPS_PROXY"] == found["https_proxy"] == PROXY
    assert found["NO_PROXY"] == found["no_proxy"] == "127.0.0.1,localhost,::1"
    assert not [name for name in found if name.lower() == "http_proxy"]


def test_what_needs_no_proxy_is_kept_and_loopback_added() -> None:
    given = {"HTTPS_PROXY": PROXY, "NO_PROXY": "intranet, localhost"}
    assert network_environment(given)["no_proxy"] == "intranet,localhost,127.0.0.1,::1"
    assert network_environment({"HTTPS_PROXY": PROXY, "NO_PROXY": "*"})["no_proxy"] == "*"


def test_adding_twice_adds_nothing(authority: Path) -> None:
    given = {"HTTPS_PROXY": PROXY, "CONSILIUM_CA_FILE": str(authority)}
    once = given | network_environment(given)
    assert network_environment(once) == {}


def test_every_client_trusts_the_named_authorities(authority: Path) -> None:
    found = network_environment({"CONSILIUM_CA_FILE": str(authority)})
    assert found == dict.fromkeys(NAMES, str(authority))


def test_what_is_set_for_one_library_stays(authority: Path) -> None:
    given = {"CONSILIUM_CA_FILE": str(authority), "AWS_CA_BUNDLE": "/etc/own.pem"}
    assert "AWS_CA_BUNDLE" not in network_environment(given)


@pytest.mark.parametrize("content", [None, b"", b"\x30\x82 no text"])
def test_a_file_that_holds_no_certificate_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "authorities.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match="CONSILIUM_CA_FILE: found") as fault:
        network_environment({"CONSILIUM_CA_FILE": str(path)})
    assert str(tmp_path) not in str(fault.value)


def test_the_clients_read_the_variables(authority: Path) -> None:
    """Each library's own words for the file that it would trust."""
    code = (
        "import os, requests, ssl\n"
        "from prefect.settings import get_current_settings\n"
        "print(requests.Session().merge_environment_settings('https://x', {}, None, None, None)"
        "['verify'])\n"
        "print(ssl.get_default_verify_paths().cafile)\n"
        "print(get_current_settings().api.ssl_cert_file)\n"
    )
    added = network_environment({"CONSILIUM_CA_FILE": str(authority)})
    ours = {k: v for k, v in os.environ.items() if k not in NAMES and "proxy" not in k.lower()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**ours, **added},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(authority)] * 3


def test_the_command_refuses_a_faulty_file_in_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", "--help"],
        env={**os.environ, "CONSILIUM_CA_FILE": str(tmp_path / "none.pem")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("consilium: CONSILIUM_CA_FILE: found no readable file")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def tunnels() -> Iterator[tuple[str, list[str]]]:
    """Stand in for a hospital's proxy that refuses every tunnel, and notes what was asked."""
    asked: list[str] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_engine_goes_through_the_proxy_and_not_for_loopback(
    tunnels: tuple[str, list[str]],
) -> None:
    """gRPC, which carries the federation, reads the variables in lower case alone."""
    proxy, asked = tunnels
    code = (
        "import grpc, sys\n"
        "for target in sys.argv[1:]:\n"
        "    try: grpc.insecure_channel(target).unary_unary('/a/b')(b'', timeout=3)\n"
        "    except grpc.RpcError: pass\n"
    )
    ours = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    given = {**ours, "HTTPS_PROXY": proxy}
    command = [sys.executable, "-c", code, "consilium.example.org:8002", "localhost:1"]
    subprocess.run(
        command, env={**given, **network_environment(given)}, capture_output=True, check=True
    )
    assert set(asked) == {"consilium.example.org:8002"}
