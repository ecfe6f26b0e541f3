"""What ends when: the certificates of the CA, of the server and of each site."""

from __future__ import annotations

import time
from collections.abc import Sequence

from server.authority import SITE_LIFE, Authority
from server.nodes import Node
from shared_models.expiry import ending


def site_end(node: Node) -> float:
    """When a site's certificate ends, Unix seconds: the roster knows the day it was signed."""
    return node.enrolled + SITE_LIFE.total_seconds()


def may_connect(node: Node) -> bool:
    """Whether a site is neither revoked nor its certificate at its end.

    Flower knows a node by its key alone, and a key has no end: so what has ended must be unregistered there.
    """
    return node.revoked is None and time.time() < site_end(node)


def warnings(authority: Authority, nodes: Sequence[Node]) -> list[str]:
    """What ends within 60 days or has ended, with what to do about it, a line each."""
    ca, server = (ending(authority.ends(path).timestamp()) for path in (authority.ca, authority.server))
    found = [f"the certificate authority {ca}; make a new server and let every site enroll there"] if ca else []
    found += [f"the server's certificate {server}; renew it: fedzoo server renew"] if server else []
    return found + [
        f"the certificate of site '{node.site}' {said}; revoke it and invite it; there: fedzoo client renew INVITE"
        for node in nodes
        if node.revoked is None and (said := ending(site_end(node)))
    ]
