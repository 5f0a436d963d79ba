"""How our servers listen, and whose word they take for who is asking."""

import json

import pytest
import uvicorn

from lora_gpt2.serving.http import PatientProtocol, build_config, is_loopback
from tests.serving import ask, running


async def echo(scope, receive, send):
    """Answers with what the server believes of a request."""
    seen = {"client": scope["client"][0], "scheme": scope["scheme"], "root_path": scope["root_path"]}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(seen).encode()})


def test_a_request_says_nothing_about_who_sent_it_and_the_answer_nothing_about_who_answered(monkeypatch):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # uvicorn would believe anybody, if it believed at all
    claims = {
        "X-Forwarded-For": "203.0.113.9",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Prefix": "/x",
        "X-Real-IP": "203.0.113.9",
        "Forwarded": "for=203.0.113.9;proto=https",
    }
    with running(uvicorn.Server(build_config(echo, PatientProtocol, 5))) as port:
        for given in ({}, claims):
            status, headers, seen = ask(port, "/", headers=given)
            assert (status, seen) == (200, {"client": "127.0.0.1", "scheme": "http", "root_path": ""})
            assert "server" not in headers


def test_servers_are_quiet_speak_no_websockets_and_end_in_time():
    config = build_config(echo, PatientProtocol, 7)
    assert (config.app, config.http, config.timeout_graceful_shutdown) == (echo, PatientProtocol, 7)
    assert {
        name: getattr(config, name)
        for name in (
            "proxy_headers",
            "server_header",
            "access_log",
            "log_level",
            "ws",
            "lifespan",
            "loop",
            "backlog",
            "timeout_keep_alive",
        )
    } == {
        "proxy_headers": False,
        "server_header": False,
        "access_log": False,
        "log_level": "warning",
        "ws": "none",
        "lifespan": "off",
        "loop": "asyncio",
        "backlog": 4096,
        "timeout_keep_alive": 15,
    }


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.evil.example", False),
        ("box", False),
        ("", False),
        ("128.0.0.1", False),
    ],
)
def test_only_this_machines_own_addresses_are_loopback(host, loopback):
    assert is_loopback(host) is loopback
