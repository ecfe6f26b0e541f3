"""Agreeing to a job and withdrawing: what is written into `client.toml`, which a running node reads at every step."""

from __future__ import annotations

import tomllib
from pathlib import Path

from client.audit import Audit
from client.config import ClientConfig, NodeFolder, PolicyPart, load, save
from shared_models.errors import ConfigError
from shared_models.files import private_folder
from shared_models.validation import validate


def agree(node_dir: Path, job: str) -> bool:
    """Approve a job from the next instruction on; its request, where there is one, moves to `requests/approved/`.

    Returns:
        Whether the job is known here: the server has asked for it, or it was approved before.

    Raises:
        ConfigError: it is no hash, or `client.toml` cannot be read.
        PolicyError: the site's record cannot be written; then nothing is approved.
    """
    config = load(node_dir)
    folder = NodeFolder(node_dir)
    request, kept = folder.requests / f"{job}.toml", folder.approved / f"{job}.toml"
    known = job in config.policy.approve or request.exists()
    agreed = _approving(config, tuple(dict.fromkeys((*config.policy.approve, job))), "client approve")
    Audit(folder.audit).write("approve", job=job)
    save(node_dir, agreed)
    if request.exists():
        try:
            private_folder(folder.approved)
            request.replace(kept)
        except OSError as error:
            raise ConfigError(
                f"job {job} is approved, but {request} cannot be moved to {kept}: {error.strerror}",
                hint="Move or delete it by hand",
            ) from None
    return known


def guards_examples(kept: Path) -> bool:
    """Whether the node adds noise for each example in a job that was approved, whatever weights the server sends."""
    try:
        privacy = tomllib.loads(kept.read_text(encoding="utf-8")).get("privacy", {})
    except (OSError, ValueError):
        return False
    return bool(privacy.get("mode") == "sample" and privacy.get("noise") != 0)


def withdraw(node_dir: Path, job: str) -> bool:
    """Approve a job no longer, from the next instruction on.

    Returns:
        Whether `client.toml` agrees to every job, and so to this one nevertheless.

    Raises:
        ConfigError: it was not approved there, or `client.toml` cannot be read.
        PolicyError: the site's record cannot be written; the job is withdrawn nevertheless.
    """
    config = load(node_dir)
    path, policy = NodeFolder(node_dir).config, config.policy
    if job not in policy.approve:
        raise ConfigError(
            f"job {job} is not approved in {path}",
            hint="There every job is: set approve_all = false"
            if policy.approve_all
            else "What was given to `client start` lasts until the node is stopped",
        )
    left = tuple(known for known in policy.approve if known != job)
    save(node_dir, _approving(config, left, "client withdraw"))
    Audit(NodeFolder(node_dir).audit).write("withdraw", job=job)
    return policy.approve_all


def _approving(config: ClientConfig, approved: tuple[str, ...], where: str) -> ClientConfig:
    policy = validate(PolicyPart, {**config.policy.model_dump(), "approve": approved}, where)
    return config.model_copy(update={"policy": policy})
