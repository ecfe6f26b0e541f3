"""Every error a user or a peer can cause, as one tree.

::

    FedzooError
    ├── ConfigError            a job, a setting or a command line that cannot be
    │   ├── UnknownNameError   a name that no registry has (lists the nearest)
    │   └── CompatibilityError two settings that exclude each other
    ├── DataError              private data that cannot be read as the job asks
    ├── FingerprintError       two sides that would not train the same model
    ├── PolicyError            the site has not approved what was asked of it
    ├── PrivacyError           a round that the site's ledger, its secret or the guarantee itself does not allow
    ├── Rejected               a contribution that must not reach the sum
    ├── EnrollmentError        an invite, certificate or key that is refused
    ├── DeploymentError        a port, process or peer that is not there
    └── RunError               a run that cannot go on

An error says what, where, why and what to do, in one line for a person. Its `code` is the only part that may leave a
node: a fixed word, never a text made from data.
"""

from __future__ import annotations


class FedzooError(Exception):
    """Base of all errors shown as one line.

    Args:
        what: the whole message for a person on this machine; may name files and values.
        hint: what to do about it, a sentence of its own.
        code: the fixed word that may cross the network instead of the message; by default the class's own.
    """

    code = "error"

    def __init__(self, what: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        if code:
            self.code = code

    def __str__(self) -> str:
        return f"{self.what}. {self.hint}" if self.hint else self.what


class ConfigError(FedzooError):
    """A job, a setting or a command line that cannot be."""

    code = "config"


class UnknownNameError(ConfigError):
    """A name that no registry has."""

    code = "unknown-name"


class CompatibilityError(ConfigError):
    """Two settings that exclude each other; the message gives the reason."""

    code = "incompatible"


class DataError(FedzooError):
    """Private data that cannot be read as the job asks. The message names files and stays on the node."""

    code = "data"


class FingerprintError(FedzooError):
    """Two sides that would not train the same model; the message names the first difference."""

    code = "fingerprint"


class PolicyError(FedzooError):
    """The site has not approved what was asked of it."""

    code = "not-approved"


class PrivacyError(FedzooError):
    """A round that the site's ledger, its secret or the guarantee itself does not allow; nothing of it leaves."""

    code = "privacy"


class Rejected(FedzooError):  # noqa: N818
    """A contribution that must not reach the sum; `code` says why."""

    code = "rejected"


class EnrollmentError(FedzooError):
    """An invite, certificate or key that is refused."""

    code = "enrollment"


class DeploymentError(FedzooError):
    """A port, process or peer that is not there."""

    code = "deployment"


class RunError(FedzooError):
    """A run that cannot go on."""

    code = "run"
