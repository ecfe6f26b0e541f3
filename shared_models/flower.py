"""Our manifest and blob inside a Flower message, the same on both sides, and the pause between its halves."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_utils import pull_objects

from shared_models.errors import Rejected

_MANIFEST, _BLOB = "manifest", "blob"
_STYPE = "fedzoo.raw"
_OBJECT_BACKOFF_SECONDS = 0.05


def shorten_object_backoff() -> None:
    """Look sooner for the objects of a message that came before them: a default argument of flwr makes it 1 s."""
    pull_objects.__kwdefaults__ = {**(pull_objects.__kwdefaults__ or {}), "initial_backoff": _OBJECT_BACKOFF_SECONDS}


def to_record(manifest: bytes, blob: bytes) -> RecordDict:
    """One ConfigRecord with the manifest, one ArrayRecord with the blob as a single array of raw bytes."""
    array = Array(dtype="uint8", shape=(len(blob),), stype=_STYPE, data=blob)
    return RecordDict({_MANIFEST: ConfigRecord({_MANIFEST: manifest}), _BLOB: ArrayRecord({_BLOB: array})})


def from_record(record: RecordDict) -> tuple[bytes, bytes]:
    """(manifest, blob); raises Rejected("malformed") for anything that `to_record` did not make."""
    try:
        manifest, array = record.config_records[_MANIFEST][_MANIFEST], record.array_records[_BLOB][_BLOB]
    except KeyError:
        raise Rejected("a Flower message without manifest and blob", code="malformed") from None
    if not isinstance(manifest, bytes) or array.stype != _STYPE:
        raise Rejected("a Flower message whose manifest or blob is of another type", code="malformed")
    return manifest, array.data
