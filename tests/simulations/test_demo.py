"""`fedzoo demo` from the outside: it ends with table and page, or non-zero with the reason, and leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared_models.errors import ConfigError
from simulations import demo


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedzoo", "demo", "--dir", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_below(folder: Path) -> list[str]:
    """Command lines and environments of living processes that name the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in text and int(process.name) != os.getpid():
            found.append((process / "cmdline").read_bytes().decode(errors="replace"))
    return found


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty and not a demo's"):
        demo.run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_python_drops_comes_again(number: signal.Signals) -> None:
    class Channel:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # where the handler runs, and what it raises is lost

    def close_and_work() -> None:
        channel = Channel()
        del channel
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.05)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with pytest.raises(KeyboardInterrupt), demo._interruptible():
        close_and_work()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == handlers
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.deploy
def test_interrupted_it_stops_every_process(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    child = start(folder)
    deadline = time.monotonic() + 90
    while not list((folder / "nodes").glob("*/client.toml")):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.2)
    assert processes_below(folder)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=60)
    assert child.returncode not in (0, None)
    assert "Traceback" not in output
    deadline = time.monotonic() + 30  # a child that was just being started is ended by the kernel, and takes its leave
    while left := processes_below(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.deploy
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_ends_with_the_table_and_the_page(tmp_path: Path) -> None:
    child = start(tmp_path / "demo")
    output, _ = child.communicate(timeout=540)
    assert child.returncode == 0, output
    words = " ".join(output.split())
    assert "federated is above isolated on all sites' tests by" in words
    assert "continual training forgets" in words
    assert "is the same bits as the simulated one" in words
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert processes_below(tmp_path / "demo") == []
