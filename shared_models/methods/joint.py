"""Joint training: each task is trained on together with all before it, as if no data ever went away.

It processes as many samples as the other methods, of more data: no continual method has them.
"""

from __future__ import annotations

from shared_models.methods.base import Method, method


@method("joint")
class Joint(Method):
    """A continual method that forgets nothing because nothing is taken from it."""

    continual = True
    whole = True
