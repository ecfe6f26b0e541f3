"""Contrastive learning and zero-shot classes: numbers by hand, torchmetrics' recall, sums that merge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.readers.base import Examples, Store
from client.trainer import evaluate
from client.workbench import Workbench
from shared_models.errors import ConfigError
from shared_models.image_text import Features, ImageText
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.tasks.base import Batch, Task, add_sums, tasks
from shared_models.tasks.contrastive import Contrastive
from shared_models.tasks.zero_shot import ZeroShot
from shared_models.tokens import BEGIN, END, PAD, Bytes
from shared_models.validation import validate

DATA = DataPart(shape=(3, 16, 16), tokenizer="bytes", text_length=24)


def make(name: str, data: DataPart = DATA, **keys: Any) -> Any:
    declared = tasks[name]
    return declared(validate(declared.Settings, keys, "[task]"), data)


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=1)


def drawn(count: int, seed: int = 0, width: int = 8, together: float = 0.0) -> Features:
    """Random points; text i is drawn towards image i by so much."""
    source = torch.Generator().manual_seed(seed)
    image, other = (torch.randn(count, width, generator=source) for _ in range(2))
    return Features(unit(image), unit(together * image + other), torch.tensor(10.0))


def batch(count: int) -> Batch:
    return Batch(torch.zeros(count, 1), torch.zeros(count, 4, dtype=torch.int64))


def part(points: Features, rows: slice) -> Features:
    return Features(points.image[rows], points.text[rows], points.scale)


# ---- the loss --------------------------------------------------------------------------------------------------------
def test_loss_by_hand() -> None:
    """Two images at right angles, both texts at the first image, scale ln 3: rows (ln 3, ln 3) and (0, 0)."""
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    points = Features(image, text, torch.tensor(math.log(3)))
    by_image = math.log(2)  # both texts are alike to either image
    by_text = (math.log(4 / 3), math.log(4))  # softmax of (ln 3, 0) is (3/4, 1/4)
    found = make("contrastive").loss(points, batch(2))
    assert found.tolist() == pytest.approx([(by_image + t) / 2 for t in by_text], abs=1e-6)


def test_a_lone_sample_has_no_loss() -> None:
    assert make("contrastive").loss(drawn(1), batch(1)).tolist() == [0.0]


def test_samples_see_each_other() -> None:
    """The task says so: what one text is changes every image's loss."""
    task, points = make("contrastive"), drawn(4)
    moved = Features(points.image, torch.cat([points.text[:3], -points.text[3:]]), points.scale)
    assert task.unit == "batch"
    assert bool((task.loss(points, batch(4)) != task.loss(moved, batch(4))).all())


# ---- recall ----------------------------------------------------------------------------------------------------------
def test_recall_by_hand() -> None:
    """Nearer than its own are to image i as many of the texts behind it as the list says, to a text those before it."""
    nearer = [0] * 12 + [1, 4, 5, 9, 10, 19, 0, 0]
    products = torch.eye(20)
    for i, count in enumerate(nearer):
        for step in range(1, count + 1):
            products[i, (i + step) % 20] = 2.0
    sums = make("contrastive", gallery=20).sums(Features(products, torch.eye(20), torch.tensor(1.0)), batch(20))
    assert sums["hits"][0].tolist() == [14, 16, 18]
    to_texts = [sum(i != j and float(products[i, j]) == 2.0 for i in range(20)) for j in range(20)]
    assert sums["hits"][1].tolist() == [sum(n < k for n in to_texts) for k in (1, 5, 10)]
    assert sums["ranked"] == 20


def test_recall_counted_one_by_one() -> None:
    task, points = make("contrastive", gallery=30), drawn(30, together=0.7)
    values = task.values(task.sums(points, batch(30)))
    for k in (1, 5, 10):
        for name, rows in (("", points.image @ points.text.T), ("_text", points.text @ points.image.T)):
            found = [i in row.topk(k).indices.tolist() for i, row in enumerate(rows)]
            assert values[f"recall_at_{k}{name}"] == pytest.approx(sum(found) / 30)
    both = (values["recall_at_10"] + values["recall_at_10_text"]) / 2
    assert 0.34 < values["recall_at_10_mean"] == pytest.approx(both)
    assert task.headline == "recall_at_10_mean"


def test_recall_is_torchmetrics() -> None:
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    task, points = make("contrastive", gallery=40), drawn(40, seed=3, together=0.5)
    values = task.values(task.sums(points, batch(40)))
    queries = torch.arange(40).repeat_interleave(40)
    for k in (1, 5, 10):
        metric = retrieval.RetrievalRecall(top_k=k)
        theirs = metric(points.logits.flatten(), torch.eye(40).flatten().long(), indexes=queries)
        assert values[f"recall_at_{k}"] == pytest.approx(float(theirs))


def test_a_model_that_says_one_thing_finds_nothing() -> None:
    """Neither one point for all nor numbers that are none may count as found."""
    task = make("contrastive", gallery=20)
    for value in (1.0, math.nan):
        same = Features(torch.full((20, 2), value), torch.full((20, 2), value), torch.tensor(1.0))
        sums = task.sums(same, batch(20))
        assert not sums["hits"].any()
        assert sums["farther"] == 0


def test_percentile_by_hand() -> None:
    """Of three: 1 is nearest to its own, 2 has one nearer, 3 has both nearer: (1 + 1/2 + 0) / 3 one way."""
    products = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    sums = make("contrastive").sums(Features(products, torch.eye(3), torch.tensor(1.0)), batch(3))
    one_way, other = (1 + 0.5 + 0) / 3, 0.0  # a text finds all images alike, and what is alike counts as nearer
    assert make("contrastive").values(sums)["percentile"] == pytest.approx((one_way + other) / 2)


# ---- sums ------------------------------------------------------------------------------------------------------------
def test_sums_of_galleries_merge_and_what_fills_none_counts_in_no_recall() -> None:
    task, points = make("contrastive", gallery=20), drawn(50, together=0.5)
    pieces = [part(points, rows) for rows in (slice(0, 20), slice(20, 40), slice(40, 50))]
    each = [task.values(task.sums(piece, batch(len(piece.image)))) for piece in pieces]
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = dict(task.zeros)
        for i in order:
            add_sums(merged, task.sums(pieces[i], batch(len(pieces[i].image))))
        values = task.values(merged)
        assert values["examples"] == 50
        for name in task.metrics[:-1]:
            assert values[name] == pytest.approx((each[0][name] + each[1][name]) / 2)
        for name in ("percentile", "loss"):
            whole = 20 * each[0][name] + 20 * each[1][name] + 10 * each[2][name]
            assert values[name] == pytest.approx(whole / 50)
    assert math.isnan(each[2]["recall_at_10_mean"])
    assert 0 < each[2]["percentile"] < 1


def test_the_sums_of_nothing() -> None:
    task = make("contrastive")
    form = {n: (v.shape, v.dtype, v.device) for n, v in task.sums(drawn(3), batch(3)).items()}
    assert {n: (v.shape, v.dtype, v.device) for n, v in task.zeros.items()} == form
    assert not any(v.any() for v in task.zeros.values())
    for nothing in ({}, task.zeros):
        values = task.values(nothing)
        assert values["examples"] == 0
        assert all(math.isnan(values[n]) for n in (*task.metrics, "loss"))


def test_the_trainer_measures_whole_galleries() -> None:
    """25 examples in galleries of 11: two whole ones, however many a batch of training has."""
    job = Job.resolve({
        "name": "g", "model": {"name": "clip", "channels": [16]}, "task": {"name": "contrastive", "gallery": 11},
        "data": DATA.model_dump(), "train": {"batch_size": 64},
    })  # fmt: skip
    bench = Workbench(job, torch.device("cpu"))
    pairs = bench.task.draw(DATA.shape, 25, torch.Generator().manual_seed(0))
    x = (pairs.x * 40 + 128).clamp(0, 255).to(torch.uint8)
    store = Store(x, pairs.y, [str(i) for i in range(25)], job.data)
    sums = evaluate(bench, Examples(store, torch.arange(25)))
    assert (int(sums["ranked"]), int(sums["compared"]), int(sums["examples"])) == (22, 25, 25)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("contrastive", {"gallery": 10}, "'gallery'"),
        ("contrastive", {"width": 0}, "'width'"),
        ("zero-shot", {"labels": ["a"]}, "nothing to choose"),
        ("zero-shot", {"labels": ["a", "b"], "template": "a photo"}, "has no {} for the label"),
        ("zero-shot", {"labels": ["a", "b"], "prompts": {"c": "x"}}, "'c', which is not a label"),
    ],
)
def test_settings_that_cannot_be(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(name, **keys)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["contrastive", "zero-shot"])
def test_a_job_without_texts_is_refused(name: str) -> None:
    task = make(name, DataPart(shape=(3, 8, 8)), **({"labels": ["a", "b"]} if name == "zero-shot" else {}))
    with pytest.raises(ConfigError, match="about images with texts"):
        task.prompts if isinstance(task, ZeroShot) else task.draw((3, 8, 8), 2, torch.Generator())


# ---- zero-shot -------------------------------------------------------------------------------------------------------
class Fixed(ImageText):
    """An image's point is its mean colour; a text's is the colour that it starts with."""

    def image(self, x: Tensor) -> Tensor:
        return unit(x.mean(dim=(2, 3)))

    def text(self, ids: Tensor) -> Tensor:
        return torch.stack([torch.eye(3)["rgb".index(Bytes().decode(row[1:2].tolist()))] for row in ids])

    def scale(self) -> Tensor:
        return torch.tensor(2.0)


def zero_shot(**keys: Any) -> ZeroShot:
    task: ZeroShot = make("zero-shot", labels=["red", "green", "blue"], **{"template": "{} things", **keys})
    return task


def test_zero_shot_by_hand() -> None:
    """A red, a green and a green image called blue: logits 2 at the right text, and two of three are right."""
    task = zero_shot()
    x = torch.eye(3)[[0, 1, 1]][..., None, None].expand(3, 3, 4, 4)
    given = Batch(x, torch.tensor([0, 1, 2]))
    logits = task.forward(Fixed(), given)
    assert logits.tolist() == [[2, 0, 0], [0, 2, 0], [0, 2, 0]]
    values = task.values(task.sums(logits, given))
    assert values["accuracy"] == pytest.approx(2 / 3)
    right, wrong = math.log(math.exp(2) + 2) - 2, math.log(math.exp(2) + 2)
    assert values["loss"] == pytest.approx((2 * right + wrong) / 3)
    assert task.loss(logits, given).tolist() == pytest.approx([right, right, wrong])
    assert task.predict(logits, given).tolist() == [0, 1, 1]


def test_prompts_are_captions_as_a_reader_would_give_them() -> None:
    texts = pytest.importorskip("client.readers.texts")
    task = zero_shot(template="a photo of a {}.", prompts={"green": "g" * 22})
    said = ["a photo of a red.", "g" * 22, "a photo of a blue."]
    expected = torch.stack([texts.to_ids(text, Bytes(), 24) for text in said])
    assert torch.equal(task.prompts, expected)
    assert task.prompts[0, 0] == BEGIN
    assert END in task.prompts[0]
    assert task.prompts[0, -1] == PAD
    assert task.prompts[1, -1] == END


def test_a_description_that_does_not_fit_is_refused() -> None:
    """Cut off, those of all classes would be one."""
    with pytest.raises(ConfigError, match=r"'an image that shows red', is of 25 tokens, and data\.text_length is 24"):
        zero_shot(template="an image that shows {}")


def test_one_model_serves_both_tasks() -> None:
    first, second = (
        Job.resolve({
            "name": "t", "model": {"name": "clip"}, "data": DATA.model_dump(),
            "task": {"name": name, **({"labels": ["a", "b", "c"]} if name == "zero-shot" else {})},
        })
        for name in ("contrastive", "zero-shot")
    )  # fmt: skip
    one, two = (Workbench(job, torch.device("cpu")) for job in (first, second))
    assert {k: v.shape for k, v in one.entries.items()} == {k: v.shape for k, v in two.entries.items()}
    for bench in (one, two):
        pairs: Task = bench.task
        given = pairs.draw(DATA.shape, 5, torch.Generator().manual_seed(1))
        loss = pairs.loss(pairs.forward(bench.model, given), given)
        assert loss.shape == (5,)
        loss.mean().backward()
        assert all(p.grad is not None for p in bench.model.parameters())
    assert isinstance(one.task, Contrastive)
