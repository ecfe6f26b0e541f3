"""The one round loop: select, dispatch, collect, check, accumulate, finish, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from server.checkpoint import read_checkpoint, write_checkpoint
from server.events import Events
from server.executor import Executor
from server.figures import merge_sums, round_to
from server.outcome import Outcome, Progress, Totals
from server.privacy import make_privacy
from server.refinement import make_refinement
from server.task_end import ATTEMPTS, PASSING, class_means, end_task
from shared_models.checks import check_contribution
from shared_models.errors import Rejected, RunError
from shared_models.files import write_whole
from shared_models.job import Job
from shared_models.lora import ProductMean
from shared_models.messages import Budget, Contribution, Instruction, Part, payload_bytes
from shared_models.methods.base import make_method, make_pieces, overrides
from shared_models.models import models
from shared_models.nearest_mean import MEANS, find_head, no_sums
from shared_models.normalisation import merge
from shared_models.schedule import present, round_budget, task_of
from shared_models.spec import build_model
from shared_models.sums import Groups, PairwiseMean
from shared_models.tasks.base import make_task

ROW = ("examples", "samples", "steps", "norm", "halvings")  # what an event says of each site's part in a round


class Coordinator:
    """Runs one job over an executor.

    Args:
        job: the resolved job.
        executor: where contributions come from.
        run: the run's id; it names state at the sites.
        folder: receives checkpoint, events and result; None keeps nothing.
        events: where events go besides.
        evaluators: sites whose validation and test data measure the model at the end; by default the population.
        start: values of entries that an earlier stage of the job left.
        budget: (round, selected site) -> its budget, None to leave the round out; by default the job's own.
        secret: what noise of the server's is drawn from; see `make_privacy`.
    """

    def __init__(
        self,
        job: Job,
        executor: Executor,
        run: str,
        *,
        folder: Path | None = None,
        events: Events | None = None,
        evaluators: Sequence[str] | None = None,
        start: Mapping[str, Tensor] | None = None,
        budget: Callable[[int, str], Budget | None] | None = None,
        secret: bytes | None = None,
    ) -> None:
        self.job, self.executor, self.run_id, self.folder = job, executor, run, folder
        self.events = events or Events(folder / "events.jsonl" if folder else None)
        self.evaluators = evaluators
        self.budget = budget or (lambda round, site: round_budget(job, round, site))
        self.method, self.task = make_method(job), make_task(job)
        self.measure = self.task.measure(self.task.headline)
        model, self.spec = build_model(job, start=start)
        self.privacy = make_privacy(job, self.spec, secret)
        entries = model.state_dict()
        self._left = {name: entries[name] for name in self.spec.kept} if job.whole.stages else {}
        template = {name: entries[name].detach().clone() for name in self.spec.sent}
        self.state: Groups = self.method.init(template, self.spec.trained)
        self.refine = make_refinement(job, self.method, model)
        self.statistics: Mapping[str, Tensor] = {}
        self.best_model: Mapping[str, Tensor] = {}
        herds = len(job.tasks) > 1 and make_pieces(job)[-1].herds
        self.sums: Groups = no_sums(find_head(model, models[job.model.name].heads)) if herds else {}
        self.means: Mapping[str, Tensor] = {}
        self.progress = Progress()

    def run(self) -> Outcome:
        """Run to the end, from the checkpoint where there is one.

        Raises:
            RunError: too few contributions of a round were accepted, or the checkpoint belongs to another job.
            DeploymentError: too few sites are there.
        """
        part = self.job.federation
        self._restore()
        self.events.emit("start", run=self.run_id, job=self.job.hash, round=self.progress.round, rounds=part.rounds)
        if self.spec.match is not None:
            self.events.emit("weights", loaded=str(self.spec.match))
        self.executor.admit(self._probe, part.min_sites, part.wait)
        self.measure_statistics()
        if len(self.job.tasks) > 1 and not self.progress.round and self.job.stream.order == "shared":
            self.progress.untrained = self._row(0)["test"]
        self._end_task_that_is_over()
        for round in range(self.progress.round, part.rounds):
            started = time.perf_counter()
            self._train_round_again_if_lost(round)
            self.progress.round = round + 1
            self.progress.totals.seconds += time.perf_counter() - started
            self._checkpoint()  # first: what is given out of a round must not be made anew, under the same noise
            self._end_task_that_is_over()
        return self._finish()

    def _train_round_again_if_lost(self, round: int) -> None:
        """A round that lost too many sites is repeated once they are back; those that answered send the same again."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self.train_round(round)
                return
            except RunError as error:
                if error.code != "sites-lost" or attempt == ATTEMPTS:
                    raise
                self.events.emit("repeat", round=round, reason=str(error))

    def measure_statistics(self) -> None:
        """The round before the first, where the job is normalised by what its sites hold.

        Raises:
            RunError: too few sites gave their sums.
        """
        if self.job.data.normalise_by != "sites" or self.statistics:
            return
        part, base = self.job.federation, self._instruction("statistics")
        population = list(self.executor.population(part.min_sites, part.wait))
        asked = (replace(base, site=site) for site in population)
        given = {
            reply.site: reply.groups["statistics"] for reply in self.executor.run(asked) if self._accept(reply, base)
        }
        if len(given) < min(part.min_sites, len(population)) or not given:
            raise RunError(
                f"{len(given)} of {len(population)} sites gave statistics, {part.min_sites} needed",
                hint="The events of the run name the codes; numbers in data.mean and data.std need no site",
            )
        self.progress.totals.bytes_up += payload_bytes(given)
        self.statistics = merge(given[site] for site in sorted(given))
        self.events.emit("statistics", sites=sorted(given), **self._numbers())
        self._checkpoint()

    def _shown(self) -> dict[str, Any]:
        """The headline and how it is shown: what an event needs to be read alone."""
        return {"metric": self.task.headline, **asdict(self.measure)}

    def _numbers(self) -> dict[str, list[float]]:
        return {name: [round_to(v) for v in values.tolist()] for name, values in self.statistics.items()}

    # ---- one round ---------------------------------------------------------------------------------------------------
    def train_round(self, round: int) -> None:
        """One round: select, dispatch, collect, check, accumulate, finish."""
        part, totals = self.job.federation, self.progress.totals
        population = present(self.job, self.executor.population(part.min_sites, part.wait), round)
        cohort = self.privacy.cohort(population, round)
        budgets = {site: self.budget(round, site) for site in cohort}
        if not population or None in budgets.values():
            return
        down = self.method.down(self.state)
        base = self._instruction(
            "train",
            round=round,
            evaluate=tuple(("validation", t) for t in range(len(self.job.tasks))),
            groups=down,
        )
        asked = {site: replace(base, site=site, budget=budget) for site, budget in budgets.items() if budget}
        slots = {site: slot for slot, site in enumerate(cohort)}
        mean = (ProductMean if self.job.lora.train == "both" else PairwiseMean)(len(cohort))
        rows: dict[str, dict[str, float]] = {}
        refused: dict[str, str] = {}
        validation: list[Contribution] = []
        for reply in self.executor.run(asked.values()):
            slot = slots[reply.site]
            try:
                self.privacy.note(reply, asked[reply.site])  # before: what is rejected has been seen all the same
                norm = check_contribution(reply, asked[reply.site], down, part.max_update_norm)
            except Rejected as error:
                mean.skip(slot)
                if error.code == "no-data":
                    rows[reply.site] = {"examples": 0, "samples": 0, "steps": 0, "norm": 0.0, "halvings": 0}
                    validation.append(replace(reply, groups={}))
                else:
                    refused[reply.site] = error.code
                    totals.rejections += 1
                    self.events.emit("rejected", round=round, site=reply.site, code=error.code, detail=str(error))
                continue
            weight = float(reply.examples) if self.method.weighting == "examples" else 1.0
            groups = self.privacy.bounded(reply.groups, down)
            mean.add(slot, groups, dict.fromkeys(groups, weight))
            rows[reply.site] = {
                "examples": reply.examples,
                "samples": reply.samples,
                "steps": reply.steps,
                "norm": round_to(norm),
                "halvings": reply.halvings,
            }
            totals.bytes_up += payload_bytes({**reply.groups, "metrics": reply.metrics})
            totals.bytes_metrics += payload_bytes({"metrics": reply.metrics})
            validation.append(replace(reply, groups={}))
        if len(rows) < min(part.min_sites, len(cohort)):
            reasons = ", ".join(f"{site} {code}" for site, code in sorted(refused.items()))
            raise RunError(
                f"round {round}: {len(rows)} of {len(cohort)} contributions accepted, "
                f"{min(part.min_sites, len(cohort))} needed ({reasons})",
                hint="The run can be resumed from its checkpoint",
                code="sites-lost" if any(code in PASSING for code in refused.values()) else "",
            )
        self._measure(round, validation)
        accepted = sum(row["examples"] > 0 for row in rows.values())
        means = self.privacy.released(mean.result(), down, accepted, len(population), round)
        self.privacy.settle(round)
        if means is not None:
            self.state = _as(down, self.method.finish(self.state, means, accepted, len(population)))
        self.state = self.refine(self.state, round)
        totals.rounds += 1
        totals.samples += int(sum(row["samples"] for row in rows.values()))
        totals.sequential_steps += int(max((row["steps"] for row in rows.values()), default=0))
        totals.optimizer_resets += sum(row["steps"] > 0 for row in rows.values())
        totals.bytes_down += payload_bytes(down) * len(cohort)
        sites = sorted(rows, key=slots.__getitem__)
        columns: dict[str, Any] = {name: [rows[s][name] for s in sites] for name in ROW}
        if facts := self.privacy.facts(sites):
            columns["privacy"] = facts
        self.events.emit(
            "round",
            round=round,
            rounds=part.rounds,
            task=base.task,
            sites=sites,
            **columns,
            rejected=refused,
            headline=self._shown(),
            validation=self.progress.curve[-1],
        )

    def _measure(self, round: int, replies: Iterable[Contribution]) -> None:
        """Validation of the model that this round started from, over the sites that answered."""
        sums = merge_sums(replies, "validation")
        values = self.task.values(sums) if sums else {}
        self.progress.curve.append({"round": round, **{k: round_to(v) for k, v in values.items()}})
        if values and self.job.federation.select == "best":
            headline = self.task.headline
            if self.progress.is_best(headline, values[headline], round, self.measure.larger):
                self.best_model = self.state["model"]

    # ---- between tasks and at the end --------------------------------------------------------------------------------
    def _end_task_that_is_over(self) -> None:
        """Once for each task of a stream, also where the run was stopped between its last round and this."""
        task = len(self.progress.matrix)
        if len(self.job.tasks) > 1 and task < task_of(self.job, self.progress.round):
            started = time.perf_counter()
            self._end_task(task, self.progress.round - 1)
            self.progress.totals.seconds += time.perf_counter() - started
            self._checkpoint()

    def _end_task(self, task: int, round: int) -> None:
        if any(overrides(piece, "end_task") for piece in make_pieces(self.job)):
            base = self._instruction("end_task", task=task, round=round, groups=self.method.down(self.state))
            given, missed = end_task(self.executor, base, lambda reply: self._accept(reply, base, self.sums))
            self.progress.totals.bytes_up += sum(payload_bytes(groups) for groups in given.values())
            self.means = class_means(given, missed) if self.sums else {}
        row = self._row(round)
        self.progress.matrix.append(row["test"])
        if "known" in row:
            self.progress.known.append(row["known"])
        self.events.emit("task", task=task, round=round, **row)

    def _row(self, round: int) -> dict[Part, list[float]]:
        """The headline metric of the model as it is on the test part of every task, and with the task known."""
        tasks, told = range(len(self.job.tasks)), self.job.stream.kind == "classes" and self.task.chooses
        parts: tuple[Part, ...] = ("test", "known") if told else ("test",)
        replies = self._evaluate(self.state["model"], tuple((p, t) for p in parts for t in tasks), round)
        headline = self.task.headline
        return {
            p: [round_to(self.task.values(merge_sums(replies, f"{p}/{t}"))[headline]) for t in tasks] for p in parts
        }

    def _finish(self) -> Outcome:
        rounds, tasks = self.job.federation.rounds, range(len(self.job.tasks))
        parts: tuple[tuple[Part, int], ...] = tuple((p, t) for p in ("validation", "test") for t in tasks)
        started = time.perf_counter()
        replies = self._evaluate(self.state["model"], parts, rounds)
        part = self.job.federation
        trained = set(self.executor.population(part.min_sites, part.wait)) if self.evaluators is not None else set()
        self._measure(rounds, [r for r in replies if r.site in trained] or replies)
        model = self.state["model"]
        if self.progress.best is not None and self.progress.best[1] < rounds:
            model = self.best_model
            replies = self._evaluate(model, parts, rounds)
        self.progress.totals.seconds += time.perf_counter() - started
        model = {**self._left, **model}
        outcome = Outcome(
            model=model,
            fingerprint=self.spec.fingerprint,
            per_site={r.site: self.task.values(merge_sums([r], "test")) for r in sorted(replies, key=lambda r: r.site)},
            all_sites=self.task.values(merge_sums(replies, "test")),
            curve=self.progress.curve,
            matrix=self.progress.matrix,
            known=self.progress.known,
            untrained=self.progress.untrained,
            totals=self.progress.totals,
            statistics=self._numbers(),
            privacy=self.privacy.summary(),
        )
        if self.folder:
            write_whole(self.folder / "model.safetensors", save({n: t.contiguous() for n, t in model.items()}))
            if self.means:
                write_whole(self.folder / "means.safetensors", save(dict(self.means)))
        tests = {"test": outcome.all_sites, "per_site": outcome.per_site}
        spent = {"privacy": outcome.privacy} if outcome.privacy else {}
        self.events.emit("end", headline=self._shown(), **tests, totals=asdict(outcome.totals), **spent)
        return outcome

    def _evaluate(
        self, model: Mapping[str, Tensor], parts: tuple[tuple[Part, int], ...], round: int
    ) -> list[Contribution]:
        groups = {"model": model, **({MEANS: self.means} if self.means else {})}
        base = self._instruction("evaluate", round=round, evaluate=parts, groups=groups)
        asked = (replace(base, site=site) for site in self._evaluators())
        replies = [reply for reply in self.executor.run(asked) if self._accept(reply, base)]
        if not replies:
            raise RunError("no site could evaluate the model", hint="The events of the run name the codes")
        return replies

    def _accept(self, reply: Contribution, base: Instruction, expected: Groups | None = None) -> bool:
        try:
            check_contribution(reply, replace(base, site=reply.site), expected or {}, float("inf"))
        except Rejected as error:
            if error.code != "no-data":
                self.progress.totals.rejections += 1
                self.events.emit("rejected", round=base.round, site=reply.site, code=error.code, detail=str(error))
            return False
        return True

    def _evaluators(self) -> Sequence[str]:
        part = self.job.federation
        return self.evaluators if self.evaluators is not None else self.executor.population(part.min_sites, part.wait)

    # ---- instructions and checkpoints --------------------------------------------------------------------------------
    def _instruction(self, kind: Any, **fields: Any) -> Instruction:
        rounds = self.job.federation.rounds
        task = fields.pop("task", task_of(self.job, min(fields.get("round", 0), rounds - 1)))
        fields |= {"task": task, "rounds": rounds, "statistics": self.statistics}
        return Instruction(kind, self.run_id, "", self.job, self.spec.fingerprint, **fields)

    def _probe(self, site: str) -> Instruction:
        groups = {"start": self._left} if self._left and self.job.stage else {}
        round = self.progress.round  # so that a site can tell what is still to come of the run
        base = self._instruction("probe", round=round, document=self.spec.document, groups=groups)
        return replace(base, site=site)

    def _checkpoint(self) -> None:
        if self.folder:
            self.progress.privacy = self.privacy.state
            extra = {"best": self.best_model, "statistics": self.statistics, MEANS: self.means}
            groups = {**self.state, **{name: tensors for name, tensors in extra.items() if tensors}}
            facts = {
                "job": self.job.hash,
                "run": self.run_id,
                "fingerprint": self.spec.fingerprint,
                "progress": asdict(self.progress),
            }
            write_checkpoint(self.folder / "checkpoint", groups, facts)

    def _restore(self) -> None:
        found = read_checkpoint(self.folder / "checkpoint") if self.folder else None
        if found is None:
            return
        groups, facts = found
        if facts["job"] != self.job.hash:
            raise RunError(f"the checkpoint in {self.folder} belongs to another job", hint="Start a new run")
        if facts.get("fingerprint", self.spec.fingerprint) != self.spec.fingerprint:
            raise RunError(
                f"the checkpoint in {self.folder} goes on from other weights than the stage before has left now",
                hint="Start a new run",
            )
        self.best_model = groups.pop("best", {})
        self.statistics, self.means = groups.pop("statistics", {}), groups.pop(MEANS, {})
        self.state = groups
        saved = facts["progress"]
        best = tuple(saved["best"]) if saved["best"] else None
        self.progress = Progress(**{**saved, "best": best, "totals": Totals(**saved["totals"])})
        self.privacy.state = self.progress.privacy or self.privacy.state
        self.events.emit("resumed", round=self.progress.round)


def _as(like: Groups, groups: Groups) -> Groups:
    """The groups with the dtypes that travel (means are float32)."""
    return {
        g: {n: t.to(like[g][n].dtype) if g in like and n in like[g] else t for n, t in ts.items()}
        for g, ts in groups.items()
    }
