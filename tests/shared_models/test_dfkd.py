"""Data-free distillation at the server: its parts by hand, the same bits after a crash, and what it holds on digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.readers.base import Splits
from client.state import DiskState
from client.workbench import Benches
from server.coordinator import Coordinator
from server.events import Events
from server.outcome import Outcome
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.keys import generator
from shared_models.methods import dfkd
from shared_models.methods.base import make_method
from shared_models.methods.dfkd import DataFreeDistillation, distance, pixels, together
from shared_models.spec import build_model
from simulations.compare import load_sites
from simulations.engines.inprocess import InProcess
from simulations.statistics import final_average, forgetting

QUICK = {"name": "dfkd", "images": 8, "image_steps": 5, "steps": 20, "batch_size": 16}
Sites = dict[str, Splits]


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    return make_job(
        time="continual", stream={"tasks": 3}, method=QUICK, continual={"name": "finetune"}, federation={"rounds": 6}
    )


@pytest.fixture
def sites(make_splits: Callable[..., Splits]) -> Sites:
    return {name: make_splits(i, count=40) for i, name in enumerate("abc")}


def coordinator(job: Job, sites: Sites, **options: Any) -> Coordinator:
    return Coordinator(job, InProcess(list(sites), sites.__getitem__, Benches()), "run", **options)


def after_each_round(loop: Coordinator) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(averaged, as the next round finds it) of every round of a run."""
    seen, refine = [], loop.refine

    def watched(state: Any, round: int) -> Any:
        before = {n: t.clone() for n, t in state["model"].items()}
        after = refine(state, round)
        seen.append((before, {n: t.clone() for n, t in after["model"].items()}))
        return after

    loop.refine = watched
    loop.run()
    return seen


class Says(nn.Module):
    """Says the same of every x."""

    def __init__(self, *outputs: float) -> None:
        super().__init__()
        self.outputs = torch.tensor(outputs, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs.expand(len(x), -1)


def test_two_models_answer_together_by_hand() -> None:
    """Each for the classes that it knows, about their mean; what both know they say half each."""
    x = torch.zeros(2, 1)
    former, averaged = Says(1, 3, 90, 80, 0), Says(70, 60, 2, 6, 0)
    expected = torch.tensor([[-1.0, 1.0, -2.0, 2.0]] * 2)
    torch.testing.assert_close(together([(former, [0, 1]), (averaged, [2, 3])], [0, 1, 2, 3])(x), expected)
    one, other = Says(0, 4), Says(10, 6)
    torch.testing.assert_close(together([(one, [0, 1]), (other, [0, 1])], [0, 1])(x), torch.zeros(2, 2))


def test_the_loss_of_a_step_by_hand() -> None:
    """Outputs (5, 7, 3) about their mean are (0, 2, -2); said was (1, 1, -2): (1 + 1 + 0) / 3, any constant aside."""
    outputs, said = torch.tensor([[5.0, 7.0, 3.0]], requires_grad=True), torch.tensor([[1.0, 1.0, -2.0]])
    value = distance(outputs, said)
    assert value.item() == pytest.approx(2 / 3)
    assert distance(outputs + 9, said).item() == pytest.approx(2 / 3)
    value.backward()
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad, torch.tensor([[-2.0, 2.0, 0.0]]) / 3)


def test_images_lie_within_the_range_of_pixels() -> None:
    shown = pixels(DataPart(shape=(3, 2, 2), mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.1)))
    found = shown(torch.tensor([-50.0, 0.0, 50.0])[:, None, None, None].expand(3, 3, 2, 2))
    expected = torch.tensor([[-1.0, 0.0, -2.0], [0.0, 0.5, 3.0], [1.0, 1.0, 8.0]])
    torch.testing.assert_close(found[:, :, 0, 0], expected)
    table = pixels(DataPart(shape=(2,), features=("a", "b")))
    assert table(torch.tensor([[-50.0, 7.0]])).tolist() == [[-50.0, 7.0]]


@pytest.mark.parametrize(
    ("stream", "known"), [({"tasks": 3}, [7, 10]), ({"tasks": 3, "kind": "drift", "amount": 0.5}, [10, 10])]
)
def test_every_class_so_far_is_drawn_alike(
    job: Job, sites: Sites, stream: dict[str, Any], known: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of each task but the first; and the images are of these classes to both models together."""
    drawn: list[list[int]] = []
    moved = DataFreeDistillation._moved

    def watched(self: Any, noise: Tensor, wanted: Tensor, both: Any, shown: Any) -> Tensor:
        drawn.append(wanted.bincount().tolist())
        made = moved(self, noise, wanted, both, shown)
        before, after = (F.cross_entropy(both(shown(x)), wanted).item() for x in (noise, made))
        assert after < 0.9 * before
        assert len(set(made[wanted == 0].flatten(1).sum(dim=1).tolist())) == 8, "no two alike"
        return made

    monkeypatch.setattr(DataFreeDistillation, "_moved", watched)
    coordinator(job.replace(stream=stream), sites).run()
    assert drawn == [[8] * count for count in known]


def test_only_the_end_of_a_later_task_differs_from_fedavg(job: Job, sites: Sites) -> None:
    """Until then it is FedAvg to the bit, and what travels is FedAvg's to the end."""
    plain = job.replace(method={"name": "fedavg"})
    (ours, theirs), outcomes = (after_each_round(coordinator(j, sites)) for j in (job, plain)), []
    same = [all(torch.equal(a, b[n]) for n, a in before.items()) for before, b in ours]
    assert same == [True, True, True, False, True, False]
    for (averaged, _), (theirs_averaged, _) in zip(ours[:4], theirs[:4], strict=True):
        assert all(torch.equal(v, theirs_averaged[n]) for n, v in averaged.items())
    for j in (job, plain):
        totals = coordinator(j, sites).run().totals
        outcomes.append(replace(totals, seconds=0.0))
    assert outcomes[0] == outcomes[1]
    assert make_method(job).down({"model": {}, "former": {}}).keys() == {"model"}


def test_offline_it_is_fedavg(job: Job, sites: Sites) -> None:
    found, expected = (
        coordinator(job.replace(time="offline", method=m), sites).run().model for m in (QUICK, {"name": "fedavg"})
    )
    assert all(torch.equal(v, expected[n]) for n, v in found.items())


@pytest.mark.parametrize("kill", [("round", 1), ("task", 0), ("round", 3), ("task", 1), ("round", 4)])
def test_killed_between_tasks_and_resumed_is_the_same_to_the_bit(
    job: Job, sites: Sites, tmp_path: Path, kill: tuple[str, int]
) -> None:
    """The former model lies in the checkpoint, and images are drawn again by key."""

    class KilledError(Exception):
        pass

    def listen(event: dict[str, Any]) -> None:
        if (event["event"], event.get("task" if kill[0] == "task" else "round")) == kill:
            raise KilledError

    expected = coordinator(job, sites)
    whole = expected.run()
    engine = InProcess(list(sites), sites.__getitem__, Benches(), lambda name: DiskState(tmp_path / "nodes", name))
    with pytest.raises(KilledError):
        Coordinator(job, engine, "run", folder=tmp_path, events=Events(listener=listen)).run()
    torch.rand(7)  # nothing hangs on torch's global generator
    resumed = Coordinator(job, engine, "run", folder=tmp_path)
    outcome = resumed.run()
    assert outcome.matrix == whole.matrix
    assert resumed.state.keys() == {"model", "former"}
    for group, tensors in expected.state.items():
        assert all(torch.equal(v, resumed.state[group][n]) for n, v in tensors.items())


def test_it_trains_with_one_thread(job: Job, sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    refine = DataFreeDistillation.refine

    def watched(self: Any, *given: Any) -> Any:
        found.append(torch.get_num_threads())
        return refine(self, *given)

    monkeypatch.setattr(DataFreeDistillation, "refine", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        coordinator(job, sites).run()
    finally:
        torch.set_num_threads(before)
    assert found == [1] * 6


def test_a_refined_model_answers_more_like_the_former_one(job: Job, sites: Sites) -> None:
    """On images made of another seed's noise, about the classes of the first task: nearer than the averaged model."""
    longer = job.replace(method={**QUICK, "images": 50, "steps": 200}, train={"epochs": 5.0, "momentum": 0.9})
    rounds = after_each_round(coordinator(longer, sites))
    old, method = list(job.tasks[0]), make_method(longer)
    assert isinstance(method, DataFreeDistillation)

    def model(entries: dict[str, Tensor]) -> nn.Module:
        made, _ = build_model(job)
        made.load_state_dict({**made.state_dict(), **entries})
        return made.eval()

    former, averaged, refined = (model(m) for m in (rounds[1][1], *rounds[3]))
    shown, said = pixels(job.data), together([(former, old)], old)
    noise = torch.randn(40 * len(old), 1, 8, 8, generator=generator(1, "other"))
    x = shown(method._moved(noise, torch.arange(len(old)).repeat(40), said, shown))
    with torch.no_grad():
        off = [distance(m(x)[:, old], said(x)).item() for m in (averaged, refined)]
    assert off[1] < 0.5 * off[0], off


@pytest.mark.parametrize(("continual", "new"), [("finetune", [3, 4, 5, 6]), ("lwf", [3, 4, 5, 6]), ("er", range(7))])
def test_what_sites_replay_the_averaged_model_knows(
    job: Job, sites: Sites, continual: str, new: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then the new model goes on from it: with hardly a step it is the averaged one, else the former one."""
    knows: list[list[list[int]]] = []

    def watched(models: Any, known: Any) -> Any:
        knows.append([list(classes) for _, classes in models])
        return together(models, known)

    monkeypatch.setattr(dfkd, "together", watched)
    still = job.replace(continual={"name": continual}, method={**QUICK, "steps": 1, "server_lr": 1e-9})
    rounds = after_each_round(coordinator(still, sites))
    assert knows[0] == [[0, 1, 2], list(new)]
    (averaged, refined), former = rounds[3], rounds[1][1]
    start = averaged if continual == "er" else former
    assert all(torch.allclose(v, start[n], atol=1e-7) for n, v in refined.items())
    assert not all(torch.allclose(v, former[n], atol=1e-7) for n, v in averaged.items())


@pytest.mark.parametrize("continual", ["er", "er-ace", "der++", "a-gem", "ewc", "si", "lwf", "joint"])
def test_it_goes_with_what_sites_do(job: Job, sites: Sites, continual: str) -> None:
    """And at the end of a task these learn from the model that is distilled, not from the averaged one."""
    told: list[dict[str, Tensor]] = []

    class Watched(InProcess):
        def run(self, instructions: Any) -> Any:
            for instruction in instructions:
                if instruction.kind == "end_task" and instruction.site == "a":
                    told.append({n: t.clone() for n, t in instruction.groups["model"].items()})
                yield from super().run([instruction])

    engine = Watched(list(sites), sites.__getitem__, Benches())
    rounds = after_each_round(Coordinator(job.replace(continual={"name": continual}), engine, "run"))
    for model, (_, refined) in zip(told, rounds[1::2], strict=False):
        assert all(torch.equal(v, refined[n]) for n, v in model.items())
    assert len(told) == (3 if continual in ("ewc", "si", "lwf") else 0)


@pytest.mark.parametrize("part", [{"share": {"base": ["!@head"]}}, {"lora": {"rank": 2}}])
def test_what_is_not_trained_stays(make_job: Callable[..., Job], job: Job, sites: Sites, part: dict[str, Any]) -> None:
    short = job.replace(**part)
    outcome = coordinator(short, sites).run()
    start, spec = build_model(short)
    assert set(outcome.model) == set(spec.sent) < set(start.state_dict())


@pytest.mark.parametrize("mode", [{"mode": "sample"}, {"mode": "client"}, {"mode": "client", "mechanism": "ftrl"}])
def test_with_privacy_it_spends_nothing(job: Job, sites: Sites, mode: dict[str, str]) -> None:
    """It sees only what was given out: epsilon is FedAvg's."""
    private = job.replace(privacy={**mode, "noise": 1.0}, method={**QUICK, "weighting": "uniform"})
    plain = private.replace(method={"name": "fedavg", "weighting": "uniform"})
    loops = [coordinator(j, sites) for j in (private, plain)]
    ours, _ = (after_each_round(loop) for loop in loops)
    assert any(not torch.equal(v, ours[3][0][n]) for n, v in ours[3][1].items())
    spent = [loop.privacy.summary() for loop in loops]
    assert spent[0] == spent[1]
    assert spent[0]["epsilon"]


@pytest.mark.slow
def test_it_forgets_less_on_digits(make_job: Callable[..., Job]) -> None:
    """Ten digits in five tasks at three sites: far more is known with the task known, and much more without."""
    digits = make_job(
        model={"name": "cnn"}, time="continual", stream={"tasks": 5}, continual={"name": "finetune"},
        train={"lr": 0.05, "momentum": 0.9, "batch_size": 32}, federation={"rounds": 20, "min_sites": 3},
        simulation={"partition": "iid", "sites": 3},
    )  # fmt: skip
    people = load_sites(digits, Path())
    engine = InProcess(people.names, people.splits, Benches())

    def run(method: dict[str, Any]) -> Outcome:
        return Coordinator(digits.replace(method=method), engine, str(method), evaluators=people.names).run()

    plain, ours = run({"name": "fedavg"}), run({"name": "dfkd", "images": 50, "image_steps": 20})
    assert final_average(ours.known) > 0.9 > 0.7 > final_average(plain.known)
    assert final_average(ours.matrix) > final_average(plain.matrix) + 0.1
    assert forgetting(ours.matrix) < forgetting(plain.matrix) - 0.2
