"""Whole files or none, and TOML errors with their place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared_models.errors import ConfigError
from shared_models.files import private_folder, read_toml, write_whole


def test_mode_holds_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_whole(tmp_path / "key", b"secret")
        write_whole(tmp_path / "public", "text", mode=0o644)
        folder = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "public").stat().st_mode & 0o777 == 0o644
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "settings"
    write_whole(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["settings"]


def test_toml_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with pytest.raises(ConfigError, match=r"there is no .*x\.toml\. Make it"):
        read_toml(path, "Make it")
    path.write_text('a = 1\nb = "open\n')
    with pytest.raises(ConfigError, match=r"x\.toml is not valid TOML: .*line 2"):
        read_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(tmp_path)
