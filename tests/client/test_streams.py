"""Streams of domains: every example has one task, its image that task's change, at once or one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from client.readers.base import Examples, Splits, Store
from client.streams import blur, changes, drift, rotation, streamed
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.stream_part import StreamPart


def images(count: int = 200) -> Store:
    x = torch.randint(0, 256, (count, 1, 9, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Store(x, torch.arange(count) % 3, [f"{i:03d}" for i in range(count)], DataPart(shape=(1, 9, 9)))


def test_the_changes_by_hand() -> None:
    x = images(2).x
    assert torch.equal(rotation(x, 90.0), x.rot90(1, (2, 3)))
    assert torch.equal(rotation(x, 180.0), x.flip(2, 3))
    assert drift(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), 0.5).tolist() == [[[[32, 160]]]]
    assert drift(x, 0.0).equal(x)
    point = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    point[..., 4, 4] = 255
    spread = blur(point, 1.0)[0, 0].float()
    assert spread[4, 4] == pytest.approx(255 * 0.1592, abs=2)  # 1 / (2 pi)
    assert spread[4, 5] / spread[4, 4] == pytest.approx(0.6065, abs=0.03)  # exp(-1/2)


@pytest.mark.parametrize("kind", list(changes))
def test_each_task_has_its_share_of_the_change(kind: str) -> None:
    store = images()
    change, usual = changes[kind]
    found = streamed(store, StreamPart(kind=kind, tasks=5))
    assert found.tasks is not None
    counts = torch.bincount(found.tasks, minlength=5)
    assert counts.sum() == 200
    assert (counts > 20).all()
    for task in range(5):
        rows = found.tasks == task
        expected = change(store.x[rows], usual * task / 4) if task else store.x[rows]
        assert torch.equal(found.x[rows], expected)
    assert not torch.equal(found.x, store.x)
    fewer = streamed(
        Store(store.x[50:], store.y[50:], store.names[50:], store.data), StreamPart(kind=kind, tasks=5)
    )  # a task follows from the name alone
    assert fewer.tasks is not None
    assert torch.equal(fewer.tasks, found.tasks[50:])
    weaker = streamed(store, StreamPart(kind=kind, tasks=5, amount=usual / 100))
    assert (weaker.x.float() - store.x.float()).abs().sum() < (found.x.float() - store.x.float()).abs().sum()


def test_the_same_examples_come_at_once_or_one_task_after_the_other(make_job: Callable[..., Job]) -> None:
    job = make_job(stream={"kind": "blur", "tasks": 4}, federation={"rounds": 4})
    store = streamed(images(), job.stream)
    everything = Examples(store, torch.arange(200))
    stream = job.replace(time="continual")
    assert stream.tasks == (tuple(range(10)),) * 4
    assert everything.of_tasks(job, (0,)) is everything
    parts = [everything.of_tasks(stream, (t,)).rows for t in range(4)]
    assert sorted(torch.cat(parts).tolist()) == list(range(200))
    assert torch.equal(everything.of_tasks(stream, (1, 3)).rows, torch.cat([parts[1], parts[3]]).sort().values)
    assert streamed(images(), make_job().stream).tasks is None


def test_tiles_and_captions_of_one_image_come_with_one_task() -> None:
    store = images(6)
    tiles = Store(store.x, store.y, store.names, store.data, groups=["a", "a", "b", "b", "c", "c"])
    found = streamed(tiles, StreamPart(kind="drift", tasks=3)).tasks
    assert found is not None
    assert found[0::2].equal(found[1::2])


def test_a_node_reads_what_the_stream_makes_of_its_images(make_job: Callable[..., Job]) -> None:
    from client.readers import read
    from client.readers.base import Wanted
    from client.readers.parts import split

    job = make_job(stream={"kind": "rotation", "tasks": 2, "amount": 180.0})
    plain = read("digits", None, Wanted.by(make_job()))  # type: ignore[arg-type]
    turned = read("digits", None, Wanted.by(job))  # type: ignore[arg-type]
    assert turned.tasks is not None
    second = turned.tasks == 1
    assert torch.equal(turned.x[second], plain.x[second].flip(2, 3))
    splits: Splits = split(turned)
    assert all((getattr(splits, p).store.tasks == 1).any() for p in ("train", "validation", "test"))
