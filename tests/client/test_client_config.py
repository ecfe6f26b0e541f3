"""`client.toml`: written and read back, and every mistake named with its file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.config import ClientConfig, NodeFolder, load, save
from shared_models.errors import ConfigError

VALID = """
site = "hospital-a"
[server]
fleet = "h:9092"
enrollment = "h:9094"
membership = "[fd00::1]:9095"
[data]
folder = "/data"
format = "imagefolder"
[data.labels]
melanom = "melanoma"
[policy]
approve = ["{hash}"]
""".replace("{hash}", "0" * 64)


def test_read_and_written_back(tmp_path: Path) -> None:
    NodeFolder(tmp_path).config.write_text(VALID)
    config = load(tmp_path)
    assert config.data.labels == {"melanom": "melanoma"}
    assert config.policy.approve == ("0" * 64,)
    assert not config.policy.approve_all
    assert config.device == "auto"
    save(tmp_path, config)
    assert load(tmp_path) == config
    assert NodeFolder(tmp_path).config.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format", "formt", r"client\.toml: .*'data\.formt', did you mean 'format'"),
        ('"h:9092"', '"h"', r"'server\.fleet'.*'h'"),
        ('"h:9092"', '"https://h:9092"', r"'server\.fleet'"),
        ('"hospital-a"', '"../a"', r"'site'"),
        ('folder = "/data"', "", r"'data\.folder' is missing"),
        ("0" * 64, "xyz", r"'policy\.approve\.0'"),
        ('site = "hospital-a"', "site = ", r"not valid TOML: .*line 2"),
        ("[policy]", "[privacy]\ncap_epsilon = 0.0\n[policy]", r"'privacy\.cap_epsilon'.*greater than 0"),
        ("[policy]", "[privacy]\ncap_epsilon = nan\n[policy]", r"'privacy\.cap_epsilon'.*greater than 0"),
        ("[policy]", "[privacy]\ndelta = 1.0\n[policy]", r"'privacy\.delta'.*less than 1"),
        (
            "[policy]",
            '[privacy]\nrequire = "all"\n[policy]',
            r"'privacy\.require'.*'none', 'sample', 'client' or 'any'",
        ),
        ("[policy]", "[privacy]\ncap_epsilom = 1.0\n[policy]", r"did you mean 'cap_epsilon'"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    NodeFolder(tmp_path).config.write_text(VALID.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_a_folder_that_is_no_node(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*client\.toml\. Enroll first"):
        load(tmp_path)


def test_settings_are_frozen(tmp_path: Path) -> None:
    NodeFolder(tmp_path).config.write_text(VALID)
    config: ClientConfig = load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.site = "other"  # type: ignore[misc]


def test_privacy_written_back(tmp_path: Path) -> None:
    """An infinite cap too."""
    text = VALID + '[privacy]\ncap_epsilon = inf\ndelta = 1e-7\ndataset = "chest"\nledger = "/l"\nrequire = "any"\n'
    NodeFolder(tmp_path).config.write_text(text)
    config = load(tmp_path)
    save(tmp_path, config)
    assert load(tmp_path) == config
    assert (config.privacy.cap_epsilon, config.privacy.delta, config.privacy.require) == (float("inf"), 1e-7, "any")
    assert (config.dataset, config.privacy.ledger) == ("chest", Path("/l"))


def test_what_is_spent_is_booked_for_the_folder_itself(tmp_path: Path) -> None:
    """Whatever link leads to it; another format reads the same people."""
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for folder, form in (("data", "imagefolder"), ("link", "csv")):
        text = VALID.replace("/data", str(tmp_path / folder)).replace("imagefolder", form)
        NodeFolder(tmp_path).config.write_text(text)
        assert load(tmp_path).dataset == str((tmp_path / "data").resolve())
