"""Instruction -> Contribution: the one entry to a site, for every engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from client.exemplars import choose
from client.exemplars import sums as exemplar_sums
from client.policy import Policy
from client.private import Plan
from client.protection import Protection, with_share
from client.readers.base import Examples, Splits
from client.replay import MEMORY, Replay
from client.state import State
from client.trainer import evaluate, in_order, train
from client.workbench import Workbench, determinism
from shared_models.checks import check_contribution
from shared_models.errors import DataError, FedzooError, FingerprintError
from shared_models.job import Job
from shared_models.keys import generator, key, keyed_global
from shared_models.messages import Budget, Contribution, Instruction, Part, refusal
from shared_models.methods.base import Progress, overrides
from shared_models.nearest_mean import MEANS, no_sums
from shared_models.normalisation import FEWEST, channel_sums
from shared_models.schedule import count_samples
from shared_models.spec import require_same
from shared_models.sums import Groups

log = logging.getLogger("fedzoo.client")

Tensors = Mapping[str, torch.Tensor]
Data = Callable[[Job], Splits]
Benches = Callable[[Job, Tensors], Workbench]


class Handler:
    """One site: its name, its data, what it remembers and what it permits.

    Args:
        site: the name that keys its randomness and its state.
        data: the site's examples under a job's preprocessing and labels.
        state: where it remembers.
        policy: what it permits.
        benches: the workbench of a job; shared by all sites of a process.
        check: whether the site checks its own answer before it leaves; an engine in whose process the round loop checks
            the very same tensors need not do it twice.
        protection: the ledger and the secret of differential privacy; without one, jobs that want it are refused.
    """

    def __init__(
        self,
        site: str,
        data: Data,
        state: State,
        policy: Policy,
        benches: Benches,
        *,
        check: bool = True,
        protection: Protection | None = None,
    ) -> None:
        self.site = site
        self.data = data
        self.state = state
        self.policy = policy
        self.benches = benches
        self.check = check
        self.protection = protection or Protection(site)

    def handle(self, instruction: Instruction) -> Contribution:
        """Do what is asked, or answer with a code. Never raises: what went wrong is logged here and stays here.

        The answer's tensors may be views of the shared model: use them before the next call.
        """
        try:
            self.policy.require(instruction)
            with determinism(instruction.job.train.deterministic):
                return self._answer(instruction)
        except FedzooError as error:
            log.error("%s, round %d: %s", instruction.kind, instruction.round, error)
            return refusal(instruction, error.code)
        except torch.OutOfMemoryError as error:
            log.error("%s, round %d: not even one example fits: %s", instruction.kind, instruction.round, error)
            return refusal(instruction, "out-of-memory")
        except Exception:
            log.exception("%s, round %d failed", instruction.kind, instruction.round)
            return refusal(instruction, "exception")

    def _answer(self, instruction: Instruction) -> Contribution:
        if instruction.site != self.site:
            raise FingerprintError(f"an instruction for '{instruction.site}' reached '{self.site}'", code="wrong-site")
        if instruction.kind == "probe":
            return self._probe(instruction)
        stage = instruction.job.stage
        bench = self.benches(instruction.job, self.state.start(instruction.run, stage) if stage else {})
        if bench.spec.fingerprint != instruction.fingerprint:
            raise FingerprintError("the server's model is not the one this node would train")
        splits = self.data(instruction.job)
        stored = self.state.replay(instruction)
        if stored is not None:
            log.info("round %d was answered before; the same answer is sent again", instruction.round)
            self.protection.answered(instruction)
            return stored
        if instruction.kind == "statistics":
            return self._statistics(instruction, splits.train)
        splits = _normalised(splits, instruction)
        kept = {owner: _on(bench.device, groups) for owner, groups in self.state.load(instruction.run).items()}
        bench.load(dict(instruction.groups["model"]), kept.get("personal", {}))
        means = _on(bench.device, instruction.groups).get(MEANS, {}).get("mean")
        metrics = {
            f"{part}/{task}/{name}": value
            for part, task in instruction.evaluate
            for name, value in self._measure(bench, splits, part, task, means).items()
        }
        if instruction.kind == "evaluate":
            return self._reply(instruction, metrics=metrics)
        examples = splits.train.due(instruction.job, instruction.task)
        ends = instruction.kind == "end_task" and MEMORY in kept.get(bench.pieces[-1].name, {})
        if not len(examples) and not (ends and bench.pieces[-1].herds):
            return self._reply(instruction, code="no-data", metrics=metrics)
        where = {"task": instruction.task, "round": instruction.round}
        with keyed_global(key(instruction.job.seed, instruction.kind, site=self.site, **where), bench.device):
            if instruction.kind == "end_task":
                return self._end_task(instruction, bench, examples, kept)
            plan = self.protection.book(instruction, _counts(splits, instruction.job), kept)
            return self._train(instruction, bench, examples, kept, metrics, plan, splits)

    def _probe(self, instruction: Instruction) -> Contribution:
        """Would this node train that model, can it read its data, and does the job fit under its cap?

        Its own document goes up for comparison.

        What an earlier stage left, of entries that no round sends, is kept where it is exactly that.
        """
        start = instruction.groups.get("start", {}) if instruction.job.stage else {}
        bench = self.benches(instruction.job, start)
        try:
            if not start.keys() <= set(bench.spec.kept):
                raise FingerprintError("the server's start values are not only of entries that stay at a node")
            require_same(bench.spec, dict(instruction.document), "the server")
        except FingerprintError as error:
            log.error("%s", error)
            return self._reply(instruction, code=error.code, document=bench.spec.document)
        if start:
            self.state.keep_start(instruction.run, instruction.job.stage, start)
        self.protection.require_room(instruction, lambda job: _counts(self.data(job), job))
        examples = len(self.data(instruction.job).train)
        return self._reply(instruction, document=bench.spec.document, examples=examples)

    def _statistics(self, instruction: Instruction, examples: Examples) -> Contribution:
        """Sums over the training examples, from which the server makes mean and deviation for all sites."""
        if len(examples) < FEWEST:
            raise DataError(
                f"{len(examples)} training examples are too few to give sums of them ({FEWEST} at least)",
                code="too-few-examples",
            )
        sums = channel_sums(examples.store.x[examples.rows], examples.store.unit)
        return self._reply(instruction, examples=len(examples), groups={"statistics": sums})

    def _train(
        self,
        instruction: Instruction,
        bench: Workbench,
        examples: Examples,
        kept: dict[str, Groups],
        metrics: dict[str, torch.Tensor],
        plan: Plan | None,
        splits: Splits,
    ) -> Contribution:
        down, method = _on(bench.device, instruction.groups), bench.pieces[0]
        after = dict(kept)
        up: Groups = {}
        if overrides(method, "answer"):
            bench.model.eval()
            up = method.answer(bench.model, bench.task, in_order(examples, bench), down)
            progress = Progress(steps=1, samples=len(examples), lr_sum=0.0)
        else:
            told = _stream(instruction, bench.device)
            states = [piece.begin_round(down, {**kept.get(piece.name, {}), **told}) for piece in bench.pieces]
            private = plan if instruction.job.privacy.mode == "sample" else None
            replay = self._replay(instruction, bench, kept)
            if bench.pieces[-1].whole:
                examples, instruction = _whole(instruction, splits, examples)
            progress = train(bench, examples, instruction, states, private, replay)
            for i, (piece, state) in enumerate(zip(bench.pieces, states, strict=True)):
                before = kept.get(piece.name, {})
                given, after[piece.name] = piece.end_round(bench.sent(), down, before, state, progress)
                up = given if i == 0 else up  # the federated method's answer; a continual piece sends nothing
            if replay is not None:
                after[replay.piece.name] = {**after[replay.piece.name], **replay.kept}
        after["personal"] = bench.personal()
        noise, part = 0.0, instruction.job.privacy
        if plan is not None and part.mode == "sample":
            noise = plan.spend.noise
        elif plan is not None and part.noise_by == "clients":
            up = with_share(instruction.job, plan, up["model"], down["model"])
        reply = self._reply(
            instruction,
            examples=len(examples),
            samples=progress.samples,
            steps=progress.steps,
            halvings=progress.halvings,
            noise=noise,
            metrics=metrics,
            groups=_on(torch.device("cpu"), up),
        )
        if self.check:
            check_contribution(reply, instruction, down, instruction.job.federation.max_update_norm)
        self.state.save(instruction, after, reply)
        self.protection.answered(instruction)
        return reply

    def _replay(self, instruction: Instruction, bench: Workbench, kept: dict[str, Groups]) -> Replay | None:
        """What the continual method keeps of examples, where it keeps any."""
        piece = bench.pieces[-1]
        if not piece.draws or len(instruction.job.tasks) == 1:
            return None
        where = {"task": instruction.task, "round": instruction.round}
        source = generator(instruction.job.seed, "replay", site=self.site, **where)
        return Replay(piece, kept.get(piece.name, {}), bench, source)

    def _end_task(
        self, instruction: Instruction, bench: Workbench, examples: Examples, kept: dict[str, Groups]
    ) -> Contribution:
        after = dict(kept)
        up: Groups = {}
        bench.model.eval()
        for piece in bench.pieces:
            batches = in_order(examples, bench)
            before = kept.get(piece.name, {})
            memory = {MEMORY: before[MEMORY]} if MEMORY in before else {}
            if piece.herds:
                memory = {MEMORY: choose(bench, examples, before.get(MEMORY, {}), piece.settings.buffer)}
                up = exemplar_sums(bench, examples.store, memory[MEMORY])
            after[piece.name] = {**memory, **piece.end_task(bench.model, bench.task, batches, before)}
        reply = self._reply(instruction, examples=len(examples), groups=up)
        if self.check:
            check_contribution(reply, instruction, no_sums(bench.head) if up else {}, math.inf)
        self.state.save(instruction, after, reply)
        return reply

    def _measure(
        self, bench: Workbench, splits: Splits, part: Part, task: int, means: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Metric sums on one part of one task's examples; `known` is the test part, with the task's classes known.

        Class means measure the test: on validation every round's model answers by its outputs.
        """
        examples = splits.validation if part == "validation" else splits.test
        among = bench.job.tasks[task] if part == "known" else ()
        means = None if part == "validation" else means
        chosen = examples.of_tasks(bench.job, (task,), bench.task.always)
        return evaluate(bench, chosen, self.site, part, among, means)

    def _reply(self, instruction: Instruction, **fields: object) -> Contribution:
        return Contribution(
            instruction.kind,
            instruction.run,
            self.site,
            instruction.task,
            instruction.round,
            **fields,  # type: ignore[arg-type]
        )


def _counts(splits: Splits, job: Job) -> list[int]:
    """The training examples that a site is at, period by period of the rounds."""
    return [len(splits.train.due(job, period)) for period in range(len(job.tasks))]


def _stream(instruction: Instruction, device: torch.device) -> Groups:
    """Which classes earlier tasks bring and which this one, (C,) bool each; nothing offline."""
    job = instruction.job
    if len(job.tasks) == 1:
        return {}
    parts = {"before": job.tasks[: instruction.task], "now": job.tasks[instruction.task : instruction.task + 1]}
    labels = torch.arange(len(job.task.labels))
    told = {
        name: torch.isin(labels, torch.tensor([c for task in tasks for c in task], dtype=torch.int64))
        for name, tasks in parts.items()
    }
    return {"stream": {name: mask.to(device) for name, mask in told.items()}}


def _whole(instruction: Instruction, splits: Splits, own: Examples) -> tuple[Examples, Instruction]:
    """The examples of all tasks so far, and the budget in which as many are processed as of the task's own."""
    examples = splits.train.due(instruction.job, instruction.task, so_far=True)
    if instruction.budget.steps is not None:
        return examples, instruction
    samples = count_samples(len(own), instruction.job.train.batch_size, instruction.budget)
    return examples, replace(instruction, budget=Budget(epochs=samples / len(examples)))


def _on(device: torch.device, groups: Groups) -> Groups:
    """The same tensors where they lie there already, copies else: a network, a disk and a sum know only the CPU."""
    return {g: {n: t.to(device) for n, t in ts.items()} for g, ts in groups.items()}


def _normalised(splits: Splits, instruction: Instruction) -> Splits:
    """The examples as the job normalises them; by what the sites measured, where it says so.

    Raises:
        FingerprintError: the statistics are missing, or not of this job's form.
    """
    if instruction.job.data.normalise_by != "sites":
        return splits
    given, form = instruction.statistics, (instruction.job.data.channels,)
    if given.keys() != {"mean", "std"} or not all(
        t.shape == form and t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in given.values()
    ):
        raise FingerprintError("the server's statistics are missing or not of this job's form")
    return splits.normalised_by(given["mean"], given["std"])
