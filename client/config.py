"""What a node knows about itself: `client.toml`, and where everything lies in the node's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared_models.files import read_toml, write_whole
from shared_models.validation import validate

Address = Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^\s:/]+):[0-9]{1,5}$")]
JobHash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """One table of `client.toml`; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerPart(Part):
    """`[server]`: where the federation's server answers, each `host:port`.

    Attributes:
        fleet: Flower's SuperLink, for the SuperNode.
        enrollment: where this node enrolled.
        membership: the mutual-TLS service that says who this node is.
    """

    fleet: Address
    enrollment: Address
    membership: Address


class DataPart(Part):
    """`[data]`: the private data of this site.

    Attributes:
        folder: absolute path; it never leaves this file.
        format: name of a registered reader, e.g. `imagefolder`.
        labels: this site's own word for a class -> the job's label, where they differ.
        values: column of a table -> this site's own word -> the word that all sites share, where codings differ.
        skip_bad: how many files or rows that cannot be used are passed over; one more stops the site's part.
    """

    folder: Path
    format: str
    labels: dict[str, str] = {}
    values: dict[str, dict[str, str]] = {}
    skip_bad: Annotated[int, Field(ge=0)] = 0


class PolicyPart(Part):
    """`[policy]`: what may run here without being asked for on the command line; read anew at each instruction.

    Attributes:
        approve: hashes of the jobs this site has agreed to, 64 hex digits each.
        approve_all: agree to every job of this server.
        statistics: give sums over the training examples (for normalisation; of `icarl`, `lloyd` and `pca`), where an
            approved job wants them.
    """

    approve: tuple[JobHash, ...] = ()
    approve_all: bool = False
    statistics: bool = True


class PrivacyPart(Part):
    """`[privacy]`: what all jobs together may tell about this site's data, and which jobs are taken at all.

    Attributes:
        cap_epsilon: the most that one data set may spend, over all jobs and restarts; `inf` for no cap.
        delta: at which the site composes, whatever delta a job says; well below 1 / examples.
        dataset: the name under which the data set is booked; the resolved data folder where it is empty. A data set
            that is renamed or moved begins at zero.
        ledger: the ledger's folder, seen from the node's; nodes of one site that read the same data share one.
        require: which jobs are taken: `none`, any; `sample` or `client`, those of that privacy mode; `any`, those of
            either. It is read anew at each instruction, the other keys when the node starts.
    """

    cap_epsilon: Annotated[float, Field(gt=0)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    dataset: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{0,200}$")] = ""
    ledger: Path = Path("ledger")
    require: Literal["none", "sample", "client", "any"] = "none"


class ClientConfig(Part):
    """The whole `client.toml`.

    Attributes:
        site: the name the server gave; the certificate carries it too.
        device: where models train: `cpu`, `cuda`, one GPU of several as `cuda:1`, or `auto`, the first GPU if there is
            one.
    """

    site: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")] = "auto"
    server: ServerPart
    data: DataPart
    policy: PolicyPart = PolicyPart()
    privacy: PrivacyPart = PrivacyPart()

    @property
    def dataset(self) -> str:
        """The name under which the ledger books what is spent of this site's data."""
        return self.privacy.dataset or str(self.data.folder.resolve())


@dataclass(frozen=True)
class NodeFolder:
    """Where everything of one node lies."""

    root: Path

    @property
    def config(self) -> Path:
        """`client.toml`, the one file meant to be edited."""
        return self.root / "client.toml"

    @property
    def ca(self) -> Path:
        """The server's certificate authority, PEM."""
        return self.root / "pki" / "ca.crt"

    @property
    def key(self) -> Path:
        """The site's private key, OpenSSH format: for the SuperNode as it is, for mutual TLS through `credentials`."""
        return self.root / "pki" / "site.key"

    @property
    def certificate(self) -> Path:
        """The site's certificate, PEM."""
        return self.root / "pki" / "site.crt"

    @property
    def flower(self) -> Path:
        """The SuperNode's private home."""
        return self.root / "flower"

    @property
    def state(self) -> Path:
        """What methods keep at this site between rounds."""
        return self.root / "state"

    @property
    def weights(self) -> Path:
        """Files of weights that jobs may start from, where the variable FEDZOO_WEIGHTS names no other folder."""
        return self.root / "weights"

    @property
    def secret(self) -> Path:
        """What noise, sampling and masks are drawn from; see `shared_models.secret`."""
        return self.root / "secret"

    @property
    def mark(self) -> Path:
        """How far this node's ledger had come, apart from the ledger itself."""
        return self.state / "ledger.json"

    @property
    def requests(self) -> Path:
        """Jobs that were asked for and wait for approval."""
        return self.root / "requests"

    @property
    def approved(self) -> Path:
        """The same, once they were approved: what this site has agreed to."""
        return self.requests / "approved"

    @property
    def logs(self) -> Path:
        """Logs of the node's processes."""
        return self.root / "logs"

    @property
    def audit(self) -> Path:
        """What this site was asked and answered; see `client.audit`."""
        return self.logs / "audit.jsonl"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder an enrolled node has."""
        return (self.root, self.ca.parent, self.flower, self.state, self.requests, self.logs)


def load(node_dir: Path) -> ClientConfig:
    """Read and check a node's `client.toml`.

    Raises:
        ConfigError: it is missing, broken (with the line) or has a key or value that cannot be (with the nearest key).
    """
    path = NodeFolder(node_dir).config
    hint = f"Enroll first: fedzoo client enroll INVITE --dir {node_dir} --data FOLDER"
    return validate(ClientConfig, read_toml(path, hint), str(path))


def save(node_dir: Path, config: ClientConfig) -> None:
    """Write `client.toml` whole, readable by this user alone."""
    import tomli_w

    write_whole(NodeFolder(node_dir).config, tomli_w.dumps(config.model_dump(mode="json")))
