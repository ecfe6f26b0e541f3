"""What `fedzoo doctor` looks at."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from shared_models.errors import DeploymentError
from shared_models.process import program

FLOWER = "1.39.0"  # the version whose internals the resident worker and the Control client use
PYTHON = ((3, 11), (3, 14))


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """All findings, in order."""
    import torch

    python = PYTHON[0] <= sys.version_info[:2] < PYTHON[1]
    findings = [Finding("python", python, f"{platform.python_version()}, needs 3.11 to 3.13")]
    findings.append(_package("flwr", FLOWER))
    for name in ("torch", "torchvision", "grpcio", "cryptography", "scipy", "scikit-image"):
        findings.append(_package(name, ""))
    cuda = torch.cuda.is_available()
    findings.append(Finding("device", True, torch.cuda.get_device_name() if cuda else "CPU (no CUDA device)"))
    findings.append(_vision())
    for name in ("flower-superlink", "flower-supernode"):
        try:
            findings.append(Finding(name, True, program(name)))
        except DeploymentError as error:
            findings.append(Finding(name, False, str(error)))
    for name, extra in (("sklearn", "scikit-learn"), ("jinja2", "jinja2")):
        findings.append(_optional(name, extra))
    return findings


def _package(name: str, wanted: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, False, "not installed")
    return Finding(
        name, not wanted or found == wanted, found if found == wanted or not wanted else f"{found}, needs {wanted}"
    )


def _vision() -> Finding:
    """A torchvision that was built for another torch fails only when an operator is used."""
    try:
        import torch
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:
        return Finding("torchvision operators", False, f"{error}. Install torch and torchvision in one command")
    return Finding("torchvision operators", True, "work")


def _optional(module: str, distribution: str) -> Finding:
    import importlib.util

    there = importlib.util.find_spec(module) is not None
    return Finding(
        distribution, True, version(distribution) if there else "absent; only simulations need it: fedzoo[simulations]"
    )
