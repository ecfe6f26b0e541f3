"""What a SuperNode's log means: every text below was written by flwr 1.39.0."""

import pytest

from client.verdict import REVOKED, STILL_ONLINE, UNREACHABLE, of_exit, of_line

CODE_305 = """\
\x1b[91mERROR \x1b[0m:     Exit Code: 305
Failed to initialize the connection to the SuperLink.
{}
The SuperNode could not establish a connection to the SuperLink.

For more information, visit: <https://flower.ai/docs/framework/1.39/en/ref-exit-codes/305.html>
INFO:     Shutting down
"""
NOT_ACTIVATED = CODE_305.format("[code: 2004] Failed to activate SuperNode.")
WRONG_CA = "\x1b[91mERROR \x1b[0m:     SSL/TLS handshake error detected.\n" + CODE_305.format(
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:54137: Tls handshake failed "
    "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: "
    "unable to get local issuer certificate: OK"
)


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("\x1b[92mINFO \x1b[0m:      SuperNode ID: 2849554570189627930", "online"),
        ("\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.49 seconds", "waiting"),
        ("\x1b[92mINFO \x1b[0m:      Connection successful after 3.21 seconds and 4 tries.", "online"),
        ("\x1b[92mINFO \x1b[0m:      Receiving: train message (ID: 7b8c91)", None),
    ],
)
def test_lines(line, state):
    verdict = of_line(line)
    assert (verdict.state if verdict else None) == state


def test_a_refused_activation_is_a_lockout_for_a_while_and_a_revoked_key_after_it():
    assert of_exit(1, NOT_ACTIVATED, "log", refused_for=0) is STILL_ONLINE
    assert of_exit(1, NOT_ACTIVATED, "log", refused_for=74) is STILL_ONLINE
    assert of_exit(1, NOT_ACTIVATED, "log", refused_for=76) is REVOKED
    assert STILL_ONLINE.pause < 60 < 75
    assert 15 <= REVOKED.pause <= 30


def test_a_wrong_certificate_authority_is_refused_and_named():
    verdict = of_exit(1, WRONG_CA, "log")
    assert verdict.state == "refused"
    assert "unable to get local issuer certificate" in verdict.reason
    assert 15 <= verdict.pause <= 30


def test_other_ends_are_waited_for_with_the_usual_pauses():
    for code, tail, text in (
        (1, CODE_305.format("something new"), "did not let this node connect"),
        (-9, "", "killed by signal 9"),
        (1, "Traceback", "exit code 1"),
        (0, "SuperNode terminated gracefully.", "ended the session"),
    ):
        verdict = of_exit(code, tail, "the.log")
        assert verdict.state == "waiting"
        assert verdict.pause is None
        assert text in verdict.reason
    assert UNREACHABLE.pause is None
