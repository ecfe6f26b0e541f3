"""What a site keeps of the examples it saw, for continual methods that replay: it never leaves the node.

Reservoir sampling (Vitter 1985, algorithm R): of all examples seen so far each is kept with the same probability, M of
them. An example is kept as it was read, before augmentation and normalisation, so that it is changed anew whenever it
comes back; with it goes, where a method wants that, what the model said when it was kept. An example that is trained on
several times is seen several times. A method that herds has what is kept chosen elsewhere, at the end of a task.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from client.readers.base import Examples
from client.workbench import Workbench
from shared_models.methods.base import Method, ReplaySettings
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, Past

MEMORY = "memory"  # the group in what a method keeps at a site


class Replay:
    """One method's kept examples at one site.

    Args:
        piece: the method; its settings say how many are kept and how many a step draws.
        kept: what it kept so far: `memory` holds x (M, *shape), y (M,), seen, and outputs (M, C) where they are kept.
        bench: augmentation and device.
        source: of the draws.
    """

    def __init__(self, piece: Method, kept: Groups, bench: Workbench, source: torch.Generator) -> None:
        settings: ReplaySettings = piece.settings
        self.piece, self.bench, self.source = piece, bench, source
        self.size = settings.buffer
        self.count = settings.replay or bench.job.train.batch_size
        found = kept.get(MEMORY, {})
        self.held = {name: tensor.cpu() for name, tensor in found.items() if name != "seen"}
        self.seen = int(found["seen"]) if found else 0

    def __len__(self) -> int:
        return len(self.held["y"]) if self.held else 0

    @property
    def kept(self) -> Groups:
        """To be kept; copies."""
        if not self.held:
            return {}
        return {MEMORY: {**{n: t.clone() for n, t in self.held.items()}, "seen": torch.tensor(self.seen)}}

    def draw(self, data: Examples) -> list[Batch]:
        """As many batches as the method draws in a step, of different examples each; none while nothing is kept.

        Args:
            data: whose store normalises.
        """
        if not len(self):
            return []
        drawn = []
        for number in range(1, self.piece.draws + 1):
            rows = torch.randperm(len(self), generator=self.source)[: self.count]
            raw = Batch(self.held["x"][rows], self.held["y"][rows])
            batch = data.store.prepare(raw, self.bench.device, self.bench.augment)
            outputs = self.held["outputs"][rows].to(batch.x.device) if "outputs" in self.held else None
            marks = torch.full((len(rows),), number, device=batch.x.device)
            drawn.append(Batch(batch.x, batch.y, past=Past(marks, torch.ones_like(marks).float(), batch.y, outputs)))
        return drawn

    def add(self, data: Examples, indices: Tensor, outputs: Tensor | None) -> None:
        """See these examples of the site; `outputs` are what the model said of them."""
        if self.piece.herds:
            return
        rows, slots = data.rows[indices], self._slots(len(indices))
        fresh = {"x": data.store.x[rows], "y": data.store.y[rows]}
        if outputs is not None:
            fresh["outputs"] = outputs.float().cpu()
        if not self.held:
            self.held = {name: tensor[:0].clone() for name, tensor in fresh.items()}
        last = {slot: place for place, slot in enumerate(slots) if slot < self.size}
        room = max([len(self), *(slot + 1 for slot in last)])
        for name, tensor in fresh.items():
            old = self.held[name]
            grown = torch.cat([old, old.new_zeros((room - len(old), *old.shape[1:]))])
            if last:
                grown[torch.tensor(list(last))] = tensor[torch.tensor(list(last.values()))]
            self.held[name] = grown

    def _slots(self, count: int) -> list[int]:
        """Where each of `count` further examples goes; `size` and beyond: nowhere."""
        numbers = torch.arange(self.seen, self.seen + count)
        drawn = (torch.rand(count, generator=self.source, dtype=torch.float64) * (numbers + 1)).long()
        self.seen += count
        return torch.where(numbers < self.size, numbers, drawn).tolist()


def join(own: Batch, drawn: Sequence[Batch], said: Sequence[Tensor | None] = ()) -> Batch:
    """One batch of a step's own examples and what was drawn, with the marks by which a method tells them apart.

    Args:
        own: the step's own examples.
        drawn: batches from the memory.
        said: (B, C), what an earlier model says of the own ones and of each draw; what was kept beside a draw yields.
    """
    parts = [own, *drawn]
    said = said or [None] * len(parts)
    if not drawn and said[0] is None:
        return own
    total, device = sum(len(part) for part in parts), own.x.device
    marks, scales, outputs = [], [], []
    width = next((p.past.outputs.shape[1:] for p in drawn if p.past and p.past.outputs is not None), None)
    for part, known in zip(parts, said, strict=True):
        marks.append(torch.zeros(len(part), dtype=torch.int64, device=device) if part.past is None else part.past.draw)
        scales.append(torch.full((len(part),), total / len(part), device=device))
        if known is None and part.past:
            known = part.past.outputs
        if known is None and width is not None:
            known = torch.zeros((len(part), *width), device=device)
        if known is not None:
            outputs.append(known)
    past = Past(torch.cat(marks), torch.cat(scales), own.y, torch.cat(outputs) if outputs else None)
    return Batch(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]), past=past)
