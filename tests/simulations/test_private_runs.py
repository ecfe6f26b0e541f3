"""Both units of privacy from the job to the report, on digits, and what a job costs before it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fedzoo
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.privacy import epsilon
from simulations.compare import compare, load_sites, run_one
from simulations.plan import variant
from simulations.privacy_cost import cost
from simulations.report import write
from simulations.results import Comparison, load, save
from simulations.tables import as_markdown, guarantees, headers

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "digits-private.toml"
SHORT = ("model.name=mlp", "federation.rounds=3", "train.epochs=1")
CLIENT = ("privacy.mode=client", "privacy.clip=0.5", "method.weighting=uniform")
TERMS = (
    r"epsilon [\d.]+ at delta 0.0001, unit (sample|client), neighbours: one (training example|site) added or removed"
)


def a_job(*overrides: str) -> Job:
    return Job.load(EXAMPLE, [*SHORT, *overrides])


def compared(job: Job, places: tuple[Any, ...] = ("centralized", "federated", "isolated")) -> Comparison:
    sites = load_sites(job, EXAMPLE.parent)
    return compare(job, sites, paradigms=[(p, "offline") for p in places], seeds=(0,))


def test_a_sample_is_protected_at_every_place_and_the_report_says_how(tmp_path: Path) -> None:
    found = compared(a_job())
    for cell in found.cells:
        assert cell.error is None
        assert cell.privacy is not None
        assert cell.privacy.epsilon.keys() == ({"all-sites"} if cell.place == "centralized" else set(found.sites))
        assert 7.9 <= (cell.privacy.largest or 0) <= 8.0
    assert headers(found)[-1] == "epsilon (± one sample, delta 0.0001)"
    said = guarantees(found)
    assert all(re.search(TERMS, line) for line in said[:3])
    assert "protects nobody" in said[3]
    page = write(found, tmp_path / "report.html").read_text()
    assert page.count("neighbours: one training example added or removed") >= 3
    assert "epsilon (± one sample, delta 0.0001) |\n" in as_markdown(found)
    assert load(save(found, tmp_path / "c.json")) == found


def test_a_site_is_protected_among_others_and_a_lone_model_is_said_to_be_unprotected() -> None:
    found = compared(a_job(*CLIENT), ("federated", "isolated"))
    federated, isolated = found.cells
    assert federated.privacy is not None
    assert federated.privacy.epsilon.keys() == {"every site"}
    assert isolated.privacy is None
    assert guarantees(found)[1] == "isolated, offline: trained without differential privacy"
    assert as_markdown(found).splitlines()[3].endswith("| no privacy |")
    assert variant(a_job(*CLIENT), "isolated", "offline", 0).privacy.mode == "none"


def test_a_site_that_was_never_taken_has_spent_nothing() -> None:
    found = compared(a_job("federation.fraction=0.3", "federation.rounds=1"), ("isolated",)).cells[0]
    assert found.error is None
    assert found.privacy is not None
    assert len(found.privacy.epsilon) == 1
    assert found.privacy.statement.startswith("epsilon 7.9") or found.privacy.statement.startswith("epsilon 8 ")


def test_without_privacy_the_report_is_as_it_was() -> None:
    job = Job.load(EXAMPLE, [*SHORT, "privacy.mode=sample"]).replace(
        privacy={"mode": "none", "epsilon": 0, "delta": 1e-5}
    )
    found = compared(job, ("federated",))
    assert not guarantees(found)
    assert headers(found)[-1] == "seconds"


def test_a_stream_is_protected_over_all_of_its_tasks(tmp_path: Path) -> None:
    job = a_job("time=continual", "stream.tasks=2", "federation.rounds=4")
    sites = load_sites(job, EXAMPLE.parent)
    cell = run_one(job, sites, tmp_path, "x").cells[0]
    assert cell.privacy is not None
    assert 7.9 <= (cell.privacy.largest or 0) <= 8.0


@pytest.mark.parametrize(
    "overrides", [(), CLIENT, (*CLIENT, "privacy.quantile=0.5")], ids=["sample", "client", "adaptive"]
)
def test_a_simulation_repeats(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    job = a_job(*overrides)
    sites = load_sites(job, EXAMPLE.parent)
    models = []
    for name in ("one", "two"):
        run_one(job, sites, tmp_path / name, "x")
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] == models[1]


def test_privacy_costs_accuracy_and_a_larger_epsilon_less() -> None:
    """Not a claim about how much: only that the noise is there, and becomes less."""

    def reached(*overrides: str) -> float:
        return compared(a_job("federation.rounds=6", *overrides), ("federated",)).cells[0].all_sites[0]

    assert reached("privacy.epsilon=0.3") + 0.1 < reached("privacy.epsilon=30.0")


def test_a_job_s_cost_before_it_runs_is_what_it_spends(tmp_path: Path) -> None:
    job = a_job()
    sites = load_sites(job, EXAMPLE.parent)
    run_one(job, sites, tmp_path, "x")
    rounds = [e for e in map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines()) if e["event"] == "round"]
    examples = rounds[0]["examples"][0]
    found = cost(job, examples)
    assert found.epsilon == pytest.approx([e["privacy"]["epsilon"][0] for e in rounds])
    assert found.stages[0].each.noise == rounds[0]["privacy"]["noise"][0]
    assert re.match(TERMS, found.lines()[0])
    client = cost(a_job(*CLIENT), None)
    assert client.epsilon[-1] <= 8.0
    assert "the server is trusted with the updates" in client.lines()[2]
    ftrl = cost(a_job(*CLIENT, "privacy.mechanism=ftrl", "federation.fraction=0.34"), None)
    assert ftrl.assumes[1] == "every site has its turn once in 3 rounds (2 nodes of a tree); no sampling"
    silent = cost(a_job("privacy.epsilon=0", "privacy.noise=0"), 100)
    assert silent.lines()[-1] == "epsilon after round 1: infinite, 2: infinite, 3: infinite"
    with pytest.raises(ConfigError, match="Say how many: --examples 600"):
        cost(job, None)
    with pytest.raises(ConfigError, match="has no differential privacy"):
        cost(Job.load(EXAMPLE.with_name("digits-vit.toml")), 10)


def test_the_command_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fedzoo.main(["privacy", str(EXAMPLE), "--examples", "360", "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["unit"], told["delta"], told["neighbours"]) == (
        "sample",
        1e-4,
        "one training example added or removed",
    )
    assert 7.98 <= told["epsilon"][-1] <= 8.0


def test_federated_learning_with_methods_that_act_after_the_noise() -> None:
    """FedProx and SCAFFOLD act after the noise, a server optimizer after the mean: the cost is the same."""
    spent = set()
    for method in ("fedavg", "fedprox", "scaffold", "fedadam"):
        found = compared(a_job(f"method.name={method}", "federation.rounds=2", "train.lr=0.05"), ("federated",))
        guarantee = found.cells[0].privacy
        assert guarantee is not None
        assert found.cells[0].rejections == 0
        spent.add(tuple(guarantee.epsilon.values()))
    assert len(spent) == 1
    assert epsilon([], 1e-5) == 0
    assert torch.isfinite(torch.tensor([e for e in next(iter(spent)) if e is not None])).all()
