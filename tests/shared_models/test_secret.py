"""A secret: made once, whole or not at all, for this user alone."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from shared_models.errors import PrivacyError
from shared_models.secret import load_secret


def test_made_at_first_use_and_then_always_the_same(tmp_path: Path) -> None:
    path = tmp_path / "node" / "secret"
    secret = load_secret(path)
    assert len(secret) == 32
    assert load_secret(path) == secret == path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_secret(tmp_path / "other") != secret


def test_whatever_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_secret(tmp_path / "secret")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}


def test_all_who_ask_at_once_get_the_same(tmp_path: Path) -> None:
    found: list[bytes] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        found.append(load_secret(tmp_path / "secret"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o777, 0o610])
def test_one_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    load_secret(path)
    path.chmod(mode)
    with pytest.raises(PrivacyError, match=rf"others may read the node's secret .*mode {mode:04o}") as caught:
        load_secret(path)
    assert caught.value.code == "secret"
    path.chmod(0o600)
    load_secret(path)


def test_the_message_says_whose_it_is(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    (tmp_path / "secret").chmod(0o600)
    with pytest.raises(PrivacyError, match=r"^the run's secret .*/secret has 5 bytes instead of 32"):
        load_secret(tmp_path / "secret", "the run's secret")


@pytest.mark.parametrize("size", [0, 1, 31, 33, 10_000])
def test_one_of_another_length_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x" * size)
    path.chmod(0o600)
    with pytest.raises(PrivacyError, match=rf"has {size} bytes instead of 32"):
        load_secret(path)
    assert path.stat().st_size == size


def test_the_message_does_not_tell_it(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"correct horse battery staple")
    path.chmod(0o600)
    with pytest.raises(PrivacyError) as caught:
        load_secret(path)
    assert "horse" not in str(caught.value)


def test_one_that_cannot_be_read_or_made(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    with pytest.raises(PrivacyError, match=r"the node's secret .* cannot be read or made: Is a directory"):
        load_secret(tmp_path / "secret")
    (tmp_path / "file").touch()
    with pytest.raises(PrivacyError, match="cannot be read or made"):
        load_secret(tmp_path / "file" / "secret")


@pytest.mark.parametrize("name", ["open", "fchmod", "fsync", "replace"])
def test_killed_while_it_is_made_there_is_none_or_a_whole_one(tmp_path: Path, name: str) -> None:
    for point in range(3):
        path = tmp_path / f"{name}-{point}" / "secret"
        child = os.fork()
        if not child:
            left, change = [point], getattr(os, name)

            def mortal(*arguments: object, left: list[int] = left, change: object = change, **named: object) -> object:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return change(*arguments, **named)  # type: ignore[operator]

            try:
                setattr(os, name, mortal)
                load_secret(path)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert not path.exists() or len(path.read_bytes()) == 32
        assert load_secret(path) == load_secret(path)
