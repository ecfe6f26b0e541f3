"""`server.toml`: where the server listens and what it tells its nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import Ports, ServerConfig, ServerFolder, load, no_proxy, save
from shared_models.errors import ConfigError


@pytest.mark.parametrize(
    ("hosts", "bind", "public"),
    [
        (("localhost",), "127.0.0.1", "localhost:9092"),
        (("127.0.0.5", "localhost"), "127.0.0.1", "127.0.0.5:9092"),
        (("fed.example.org", "localhost"), "0.0.0.0", "fed.example.org:9092"),
        (("10.0.0.5",), "0.0.0.0", "10.0.0.5:9092"),
        (("fd00::1",), "[::]", "[fd00::1]:9092"),
    ],
)
def test_a_loopback_server_is_not_exposed(hosts: tuple[str, ...], bind: str, public: str) -> None:
    config = ServerConfig(hosts=hosts)
    assert (config.bind, config.public(config.ports.fleet)) == (bind, public)
    assert config.control == "127.0.0.1:9093"


def test_read_and_written_back(tmp_path: Path) -> None:
    config = ServerConfig(hosts=("a.example", "10.0.0.5"), ports=Ports(fleet=1))
    save(tmp_path, config)
    assert load(tmp_path) == config
    assert ServerFolder(tmp_path).config.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('hosts = ["https://a"]', r"'hosts'.*'https://a' is neither a host name nor an IP"),
        ('hosts = ["a:9092"]', "neither a host name"),
        ("hosts = []", "'hosts'"),
        ("[ports]\nflet = 1", r"server\.toml: .*'ports\.flet', did you mean 'fleet'"),
        ("[ports]\nfleet = 70000", r"'ports\.fleet'"),
        ("[ports]\nfleet = 9093", "the four ports must differ"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    ServerFolder(tmp_path).config.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_a_proxy_is_kept_from_loopback() -> None:
    assert no_proxy({}) == "127.0.0.1"
    assert no_proxy({"NO_PROXY": "a.b"}) == "a.b,127.0.0.1"
    assert no_proxy({"no_proxy": "127.0.0.1,x"}) == "127.0.0.1,x"
