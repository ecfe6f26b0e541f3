"""An invite: the one string that lets a site enroll, and the reasons for which one is refused.

`fedzoo1.` + base64url(JSON) + `.` + CRC-32 of all before it (8 hex digits). A CRC-32 notices every change of one
character and every burst of up to four for certain, so a mistyped or truncated invite is known before anything is
sent. The check is against accidents, not forgery: what protects is the token (256 random bits, used once) and the
fingerprint, which tells the true server from any other.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
import zlib
from dataclasses import dataclass

from shared_models.errors import EnrollmentError

PREFIX = "fedzoo1."
TOKEN_BYTES = 32
SITE_NAME = r"[a-z0-9][a-z0-9-]{0,62}"

REFUSALS = {
    "invite-unknown": "this server has never issued that invite; ask its operator for a new one",
    "invite-used": "the invite has been used already; if that was you and it was interrupted, "
    "the operator revokes the site and invites it anew",
    "invite-expired": "the invite has expired; ask the server's operator for a new one",
    "site-revoked": "the site was revoked after this invite was issued; ask the server's operator for a new one",
    "site-enrolled": "the site is enrolled already; the operator must revoke it before it can enroll or be renewed",
    "bad-request": "the certificate request is not a valid one for an ECDSA P-384 key",
    "key-used": "that key has been enrolled before; a key serves one enrollment, make a new one",
    "busy": "the server cannot register the node at this moment; the invite stays valid, try again in a minute",
    "unknown-node": "the server does not know this node's certificate",
    "internal": "the server failed; the invite stays valid, and the server's log has the reason",
}
"""The fixed word a server answers -> what it means for the person at the node."""


def refusal(code: str) -> EnrollmentError:
    """The error for one of the `REFUSALS`, by its code."""
    return EnrollmentError(f"refused: {REFUSALS[code]}", code=code)


@dataclass(frozen=True)
class Invite:
    """What the string says.

    Attributes:
        address: `host:port` of the enrollment service.
        fingerprint: SHA-256 of the CA certificate (DER), 64 hex digits.
        token: 32 random bytes that work once.
        expires: Unix seconds.
        site: the name the server gives the site.
    """

    address: str
    fingerprint: str
    token: bytes
    expires: int
    site: str

    def require_fresh(self, now: float | None = None) -> None:
        """Raise an EnrollmentError where the invite has expired by this machine's clock (or at `now`, Unix seconds)."""
        if (time.time() if now is None else now) >= self.expires:
            until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.expires))
            raise EnrollmentError(
                f"the invite for site '{self.site}' expired at {until}",
                hint="Ask the server's operator for a new one, or set this machine's clock if it is wrong",
                code="invite-expired",
            )


def encode(invite: Invite) -> str:
    """The string to hand to a site."""
    fields = {
        "address": invite.address,
        "ca": invite.fingerprint,
        "token": _to_text(invite.token),
        "expires": invite.expires,
        "site": invite.site,
    }
    body = PREFIX + _to_text(json.dumps(fields, separators=(",", ":")).encode())
    return f"{body}.{_checksum(body)}"


def decode(text: str) -> Invite:
    """Read an invite; blanks around it do not matter.

    Raises:
        EnrollmentError: it is no invite, was mistyped or cut, or holds what no fedzoo server writes.
    """
    text = text.strip()
    if not text.startswith(PREFIX):
        raise EnrollmentError(f"this is not an invite: one starts with '{PREFIX}'", code="invite-malformed")
    body, _, checksum = text.rpartition(".")
    if checksum != _checksum(body):
        raise EnrollmentError(
            "the invite is damaged: a character is wrong or missing",
            hint="Copy the whole string again, from 'fedzoo1.' to the last character",
            code="invite-malformed",
        )
    try:
        fields = json.loads(_from_text(body[len(PREFIX) :]))
        invite = Invite(
            address=str(fields["address"]),
            fingerprint=str(fields["ca"]),
            token=_from_text(fields["token"]),
            expires=int(fields["expires"]),
            site=str(fields["site"]),
        )
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        raise _malformed() from None
    host, _, port = invite.address.rpartition(":")
    if (
        not host
        or not re.fullmatch(r"[0-9]{1,5}", port)
        or not re.fullmatch(r"[0-9a-f]{64}", invite.fingerprint)
        or not re.fullmatch(SITE_NAME, invite.site)
        or len(invite.token) != TOKEN_BYTES
        or not 0 < invite.expires < 2**40
    ):
        raise _malformed()
    return invite


def _malformed() -> EnrollmentError:
    return EnrollmentError("the invite holds something that no fedzoo server writes", code="invite-malformed")


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def _to_text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _from_text(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
