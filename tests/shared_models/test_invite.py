"""An invite survives the way by mail and telephone, or says that it did not."""

from __future__ import annotations

import base64
import dataclasses
import json
import string
import zlib

import pytest

from shared_models.errors import EnrollmentError
from shared_models.invite import Invite, decode, encode

INVITE = Invite("fed.example.org:9094", "ab" * 32, bytes(range(32)), 1_900_000_000, "hospital-a")


def crafted(**changes: object) -> str:
    """An invite with other fields and a checksum that fits."""
    fields = {"address": "h:1", "ca": "ab" * 32, "token": "A" * 43, "expires": 5, "site": "a"} | changes
    text = json.dumps({k: v for k, v in fields.items() if v is not None}).encode()
    body = "fedzoo1." + base64.urlsafe_b64encode(text).decode().rstrip("=")
    return f"{body}.{zlib.crc32(body.encode()):08x}"


def test_what_is_encoded_is_decoded() -> None:
    text = encode(INVITE)
    assert decode(f"  {text}\n") == INVITE
    assert set(text) <= set(string.ascii_letters + string.digits + "-_.")


def test_ipv6_address() -> None:
    invite = dataclasses.replace(INVITE, address="[fd00::1]:9094")
    assert decode(encode(invite)) == invite


def test_every_change_of_one_character_is_noticed() -> None:
    text = encode(INVITE)
    for place in range(len(text)):
        for other in "Aa0_.~ é":
            if other != text[place]:
                with pytest.raises(EnrollmentError):
                    decode(text[:place] + other + text[place + 1 :])


def test_every_truncation_is_noticed() -> None:
    text = encode(INVITE)
    for length in range(len(text)):
        with pytest.raises(EnrollmentError, match=r"not an invite|damaged"):
            decode(text[:length])


def test_the_crafted_template_itself_is_valid() -> None:
    assert decode(crafted()).site == "a"


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "no-port"},
        {"address": ":9"},
        {"address": "h:port"},
        {"ca": "zz" * 32},
        {"token": "AAAA"},
        {"token": "*" * 43},
        {"token": 7},
        {"site": "../../etc"},
        {"site": None},
        {"expires": "soon"},
        {"expires": -1},
        {"expires": 1e400},
    ],
)
def test_contents_no_server_writes_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(EnrollmentError, match="no fedzoo server writes"):
        decode(crafted(**changes))


def test_nested_json_does_not_crash() -> None:
    body = "fedzoo1." + base64.urlsafe_b64encode(b"[" * 100_000).decode().rstrip("=")
    with pytest.raises(EnrollmentError):
        decode(f"{body}.{zlib.crc32(body.encode()):08x}")


def test_expiry() -> None:
    INVITE.require_fresh(now=1_899_999_999)
    with pytest.raises(EnrollmentError, match="2030-03-17 17:46 UTC") as caught:
        INVITE.require_fresh(now=1_900_000_000)
    assert caught.value.code == "invite-expired"
