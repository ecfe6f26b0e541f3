"""The block in `docs/add-a-model.md` is a whole model: registered, it trains in a federation and has a card."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.readers.base import Splits
from client.workbench import Benches
from server.coordinator import Coordinator
from shared_models.cli import app
from shared_models.job import Job
from shared_models.models import models
from shared_models.spec import build_model
from simulations.engines.inprocess import InProcess

PAGE = Path(__file__).parent.parent / "docs" / "add-a-model.md"


@pytest.fixture
def block() -> Iterator[str]:
    """The page's Python block, registered while the test runs."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    assert "vit" in models, "the registry must be full before it is added to"
    before = dict(models._things)
    code = compile(found[1], str(PAGE), "exec", dont_inherit=True)
    exec(code, {"__name__": "shared_models.zoo.mixer"})
    yield found[1]
    models._things.clear()
    models._things.update(before)


def test_it_is_about_thirty_lines(block: str) -> None:
    lines = [line for line in block.splitlines() if line.strip()]
    documentation = sum(
        isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in ast.walk(ast.parse(block))
    )
    assert len(lines) - documentation <= 30


def test_it_trains_in_a_federation(
    block: str, make_job: Callable[..., Job], make_splits: Callable[..., Splits]
) -> None:
    job = make_job(model={"name": "mixer"}, train={"lr": 0.1, "epochs": 8}, federation={"rounds": 4})
    sites = {name: make_splits(i, classes=3) for i, name in enumerate(("a", "b"))}
    outcome = Coordinator(job, InProcess(list(sites), sites.__getitem__, Benches()), "run").run()
    curve = [row["loss"] for row in outcome.curve]
    assert curve[-1] < 0.7 * curve[0]
    assert build_model(job)[1].fingerprint != build_model(job.replace(model={"size": "wide"}))[1].fingerprint


def test_it_has_a_card(block: str) -> None:
    done = CliRunner().invoke(app, ["models", "show", "mixer"])
    assert done.exit_code == 0, done.output
    assert "mixer" in done.output
    assert "wide" in done.output
