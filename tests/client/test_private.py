"""DP-SGD by hand: clip, noise, sampling, what it depends on, and where it is plain training bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from client.handler import Handler
from client.policy import Policy
from client.private import Plan, PrivateSteps, add_clipped, clip_factors, simulated_secret
from client.protection import Protection
from client.readers.base import Examples, Splits
from client.spending import round_spend
from client.state import MemoryState
from client.trainer import train
from client.workbench import Benches, Workbench
from shared_models.errors import PrivacyError
from shared_models.job import Job
from shared_models.messages import Budget, Contribution, Instruction
from shared_models.noise import derive, normal
from shared_models.privacy import Spend, epsilon, sampling_rate
from shared_models.schedule import count_samples, count_steps
from shared_models.spec import build_model
from shared_models.tasks.base import Batch

CPU = torch.device("cpu")
ERROR = 1e-6
MakeJob = Callable[..., Job]
MakeSplits = Callable[..., Splits]
OFF = {"mode": "sample", "noise": 0, "clip": 0, "sampling": "shuffle"}


def steps_of(job: Job, data: Examples, spend: Spend, key: bytes = b"k" * 32) -> tuple[Workbench, PrivateSteps]:
    bench = Workbench(job, CPU)
    bench.to_training()
    return bench, PrivateSteps(bench, data, Plan(spend, key), ())


def given(bench: Workbench) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in bench.trained.values() if p.grad is not None])


def never(batch: Batch) -> None:
    raise AssertionError("the plain gradient was asked for")


# ---- clip ------------------------------------------------------------------------------------------------------------
def test_clip_by_hand() -> None:
    gradients = {"a": torch.tensor([[3.0], [0.3], [0.0]]), "b": torch.tensor([[[4.0]], [[0.4]], [[0.0]]])}
    total = {"a": torch.zeros(1), "b": torch.zeros(1, 1)}
    add_clipped(total, gradients, 1.0)  # norms over both: 5, 0.5 and 0
    assert total["a"].item() == pytest.approx(3 / 5 + 0.3, rel=2e-5)
    assert total["b"].item() == pytest.approx(4 / 5 + 0.4, rel=2e-5)
    assert clip_factors(torch.tensor([0.5, 1e30]), 0.0).tolist() == [1.0, 1.0]


def test_a_clipped_norm_never_exceeds_the_clip_in_float32() -> None:
    source = torch.Generator().manual_seed(1)
    for clip in (0.1, 1.0, 7.3):
        for size in (3, 1000, 100_000):
            g = torch.randn(4, size, generator=source) * torch.logspace(-3, 6, 4)[:, None]
            total = {"g": torch.zeros(size)}
            for row in g:
                one = {"g": torch.zeros(size)}
                add_clipped(one, {"g": row[None]}, clip)
                assert float(one["g"].double().norm()) <= clip
            add_clipped(total, {"g": g}, clip)
            assert float(total["g"].double().norm()) <= 4 * clip


def test_an_example_without_a_finite_gradient_counts_as_zero() -> None:
    bad = {"g": torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [0.3, 0.4], [3e38, 3e38]])}
    total = {"g": torch.zeros(2)}
    add_clipped(total, bad, 1.0)
    torch.testing.assert_close(total["g"], torch.tensor([0.3, 0.4]))


# ---- one step --------------------------------------------------------------------------------------------------------
def test_a_step_is_the_sum_by_hand_over_the_expected_size(make_job: MakeJob, make_splits: MakeSplits) -> None:
    data = make_splits(1, count=30).train
    job = make_job(privacy={"mode": "sample", "noise": 2.0, "clip": 0.5})
    bench, private = steps_of(job, data, Spend(2.0, 0.25, 3), b"x" * 32)
    assert private.expected == 7.5
    batch = data.batch(torch.tensor([0, 4, 9]), CPU)
    private.gradients(batch, never)
    total = torch.zeros(len(given(bench)))
    for i in range(3):
        loss = bench.task.loss(bench.task.forward(bench.model, batch[i : i + 1]), batch[i : i + 1]).sum()
        g = torch.cat([v.flatten() for v in torch.autograd.grad(loss, list(bench.trained.values()))])
        total += g * min(1.0, 0.5 / float(g.norm()))
    noise = normal(derive(b"x" * 32, "noise", 0), len(total))
    torch.testing.assert_close(given(bench), (total + 2.0 * 0.5 * noise) / 7.5, atol=1e-5, rtol=1e-4)
    private.gradients(batch, never)
    again = normal(derive(b"x" * 32, "noise", 1), len(total))
    torch.testing.assert_close(given(bench), (total + again) / 7.5, atol=1e-5, rtol=1e-4)


def test_an_empty_step_is_noise_alone_with_the_stated_deviation(make_job: MakeJob, make_splits: MakeSplits) -> None:
    data = make_splits(1, count=40).train
    job = make_job(privacy={"mode": "sample", "noise": 1.5, "clip": 0.2})
    bench, private = steps_of(job, data, Spend(1.5, 0.1, 30))
    found = []
    for _ in range(20):
        private.gradients(data.batch(torch.tensor([], dtype=torch.int64), CPU), never)
        found.append(given(bench).double() / (1.5 * 0.2 / 4.0))
    noise = torch.cat(found).numpy()
    low, high = stats.chi2.ppf([ERROR / 2, 1 - ERROR / 2], len(noise))
    assert low < float((noise**2).sum()) < high
    assert stats.kstest(noise, "norm").pvalue > ERROR
    assert stats.pearsonr(found[0].numpy(), found[1].numpy()).pvalue > ERROR, "fresh in every step"


def test_one_example_more_moves_a_step_by_at_most_the_clip(make_job: MakeJob, make_splits: MakeSplits) -> None:
    """Random neighbouring batches, the noise off: add/remove sensitivity in units of the clip."""
    data = make_splits(2, count=30).train
    job = make_job(model={"name": "cnn"}, privacy={"mode": "sample", "noise": 0, "clip": 0.3})
    bench, private = steps_of(job, data, Spend(0.0, 0.5, 1))
    source, most = torch.Generator().manual_seed(5), 0.0
    for _ in range(20):
        rows = torch.randperm(30, generator=source)[: int(torch.randint(1, 12, (), generator=source))]
        sums = []
        for chosen in (rows, rows[:-1]):
            private.gradients(data.batch(chosen, CPU), never)
            sums.append(given(bench).double() * private.expected)
        most = max(most, float((sums[0] - sums[1]).norm()) / 0.3)
    assert 0.9 < most <= 1.0


def test_large_batches_are_computed_in_parts(
    make_job: MakeJob, make_splits: MakeSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_splits(2, count=20).train
    job = make_job(privacy={"mode": "sample", "noise": 1.0})
    batch = data.batch(torch.arange(20), CPU)
    bench, private = steps_of(job, data, Spend(1.0, 0.5, 1))
    private.gradients(batch, never)
    whole = given(bench).clone()
    bench, private = steps_of(job, data, Spend(1.0, 0.5, 1))
    private.largest, before = 8, private.per_sample
    sizes: list[int] = []

    def scarce(part: Batch) -> Any:
        if len(part) > 4:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(part))
        return before(part)

    monkeypatch.setattr(private, "per_sample", scarce)
    private.gradients(batch, never)
    assert sizes == [4] * 5
    torch.testing.assert_close(given(bench), whole, atol=1e-6, rtol=1e-4)


# ---- sampling --------------------------------------------------------------------------------------------------------
def test_sampling_is_poisson_with_the_stated_rate(make_job: MakeJob, make_splits: MakeSplits) -> None:
    data = make_splits(1, count=40).train
    job = make_job(privacy={"mode": "sample", "noise": 1.0})
    _, private = steps_of(job, data, Spend(1.0, 0.1, 2000))
    taken = torch.stack([torch.bincount(rows, minlength=40) for rows in private.order()]).double()
    assert taken.max() == 1
    sizes = taken.sum(dim=1)
    assert (sizes == 0).any(), "a step without an example happens"
    assert stats.binomtest(int(taken.sum()), 40 * 2000, 0.1).pvalue > ERROR
    each = taken.sum(dim=0).numpy()
    assert stats.chi2.sf(float(((each - 200) ** 2 / (2000 * 0.1 * 0.9)).sum()), 40) > ERROR
    variance = float(((sizes - 4) ** 2).sum()) / 3.6  # that of a binomial: not one of fixed-size batches
    low, high = stats.norm.ppf([ERROR, 1 - ERROR], loc=2000, scale=math.sqrt(2 * 2000 * 1.1))
    assert low < variance < high


@pytest.mark.parametrize(
    ("examples", "size", "budget"),
    [(100, 32, Budget(epochs=1)), (96, 32, Budget(epochs=2)), (10, 32, Budget(epochs=3)), (50, 8, Budget(steps=5))],
)
def test_the_expected_samples_are_the_budget(examples: int, size: int, budget: Budget) -> None:
    steps, samples = count_steps(examples, size, budget), count_samples(examples, size, budget)
    rate = sampling_rate(examples, samples, steps)
    assert rate * examples * steps == pytest.approx(samples)
    assert rate * examples <= size
    assert rate <= 1


# ---- plain training bit for bit --------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["mlp", "cnn", "vit", "resnet18"])
@pytest.mark.parametrize("train_part", [{"momentum": 0.9}, {"optimizer": "adamw", "lr": 0.003}])
def test_no_noise_and_no_clip_is_plain_training_bit_for_bit(
    make_job: MakeJob, make_splits: MakeSplits, model: str, train_part: dict[str, Any]
) -> None:
    data, trained = make_splits(1, count=21).train, []
    for privacy in ({"mode": "none"}, OFF):
        job = make_job(
            model={"name": model}, train={**train_part, "epochs": 2}, augment={"flip": True}, privacy=privacy
        )
        bench = Workbench(job, CPU)
        instruction = Instruction("train", "r", "s", job, "", round=1, rounds=2, budget=Budget(epochs=2))
        plan = Plan(Spend(0.0, 1.0, 6), b"") if privacy is OFF else None
        progress = train(bench, data, instruction, [{}, {}], plan)
        trained.append(({n: t.clone() for n, t in bench.entries.items()}, progress))
    (plain, a), (private, b) = trained
    assert all(torch.equal(private[n], t) for n, t in plain.items())
    assert (a.steps, a.samples, a.lr_sum) == (b.steps, b.samples, b.lr_sum)


def test_a_clip_that_nothing_reaches_is_plain_training_up_to_rounding(
    make_job: MakeJob, make_splits: MakeSplits
) -> None:
    data, trained = make_splits(1, count=24).train, []
    for privacy in (OFF, {**OFF, "clip": 1e6}):
        bench = Workbench(make_job(privacy=privacy, train={"batch_size": 8}), CPU)
        instruction = Instruction("train", "r", "s", bench.job, "", budget=Budget(epochs=1))
        train(bench, data, instruction, [{}, {}], Plan(Spend(0.0, 1.0, 3), b""))
        trained.append({n: t.clone() for n, t in bench.entries.items()})
    assert any(not torch.equal(trained[0][n], t) for n, t in trained[1].items()), "it goes another way"
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-6, rtol=1e-4)


def test_poisson_without_clip_and_noise_divides_by_the_expected_size(
    make_job: MakeJob, make_splits: MakeSplits
) -> None:
    data = make_splits(1, count=24).train
    bench, private = steps_of(make_job(privacy={"mode": "sample", "noise": 0, "clip": 0}), data, Spend(0.0, 0.25, 1))
    batch = data.batch(torch.arange(3), CPU)

    def plain(part: Batch) -> None:
        bench.optimizer.zero_grad(set_to_none=True)
        bench.task.loss(bench.task.forward(bench.model, part), part).mean().backward()

    plain(batch)
    mean = given(bench).clone()
    private.gradients(batch, plain)
    torch.testing.assert_close(given(bench), mean * 3 / 6)
    private.gradients(batch[:0], plain)
    assert not given(bench).any()


# ---- a site ----------------------------------------------------------------------------------------------------------
def ask(job: Job, splits: Splits, secret: bytes | None, site: str = "s", **fields: Any) -> Contribution:
    protection = Protection(site, secret=None if secret is None else lambda job: secret)
    handler = Handler(
        site, lambda job: splits, MemoryState(), Policy(approve_all=True), Benches(CPU), protection=protection
    )
    model, spec = build_model(job)
    sent = {n: model.state_dict()[n].detach().clone() for n in spec.sent}
    fields = {"budget": Budget(epochs=1), "rounds": 2, "groups": {"model": sent}, **fields}
    reply = handler.handle(Instruction("train", "r", site, job, spec.fingerprint, **fields))
    return replace(reply, groups={g: {n: t.clone() for n, t in ts.items()} for g, ts in reply.groups.items()})


def flat(reply: Contribution) -> torch.Tensor:
    return torch.cat([t.flatten() for t in reply.groups["model"].values()])


def test_what_the_server_has_does_not_give_the_noise(make_job: MakeJob, make_splits: MakeSplits) -> None:
    """The same job, instruction and data, everything the server has: only the node's secret decides what is drawn."""
    job, splits = make_job(privacy={"mode": "sample", "noise": 1.0}), make_splits(1)
    one, same, other = (ask(job, splits, s) for s in (b"a" * 32, b"a" * 32, b"b" * 32))
    assert (one.code, one.noise) == ("ok", 1.0)
    assert torch.equal(flat(one), flat(same)), "repeatable by the node"
    assert not torch.equal(flat(one), flat(other))
    guess = ask(job, splits, simulated_secret(job, "s"))  # all a server could derive from the job and the site's name
    drawn = flat(one) - flat(guess)
    assert stats.pearsonr(drawn.numpy(), (flat(other) - flat(guess)).numpy()).statistic < 0.6
    assert float(drawn.norm()) > 0.5 * float((flat(one) - flat(other)).norm()), "as far off as any other guess"


@pytest.mark.parametrize("change", ["round", "task", "model", "site", "run", "kept"])
def test_no_two_different_rounds_share_their_noise(make_job: MakeJob, make_splits: MakeSplits, change: str) -> None:
    job = make_job(privacy={"mode": "sample", "noise": 1.0})
    protection = Protection("s", secret=lambda job: b"a" * 32)
    base = Instruction("train", "r", "s", job, "f", rounds=2, groups={"model": {"w": torch.zeros(2)}})
    others = {
        "round": replace(base, round=1),
        "task": replace(base, task=1),
        "model": replace(base, groups={"model": {"w": torch.ones(2)}}),
        "site": base,
        "run": replace(base, run="q"),
        "kept": base,
    }
    kept = {"personal": {"model": {"h": torch.ones(1)}}} if change == "kept" else {}
    second = Protection("t" if change == "site" else "s", secret=lambda job: b"a" * 32)
    a = protection.book(base, [30], {})
    again = protection.book(base, [30], {})
    b = second.book(others[change], [30], kept)
    assert a is not None
    assert a == again
    assert b is not None
    assert a.key != b.key


def test_a_changed_instruction_is_refused_under_the_same_round(make_job: MakeJob) -> None:
    protection = Protection("s", secret=lambda job: b"a" * 32)
    base = Instruction("train", "r", "s", make_job(privacy={"mode": "sample", "noise": 1.0}), "f", rounds=2)
    protection.book(base, [30], {})
    with pytest.raises(PrivacyError, match="was booked for another instruction") as error:
        protection.book(replace(base, groups={"model": {"w": torch.ones(2)}}), [30], {})
    assert error.value.code == "privacy-altered"


def test_without_a_secret_nothing_runs(make_job: MakeJob, make_splits: MakeSplits) -> None:
    private = make_job(privacy={"mode": "sample", "noise": 1.0})
    assert ask(private, make_splits(1), None).code == "no-secret"
    assert ask(make_job(), make_splits(1), None).code == "ok"


def test_how_many_examples_came_does_not_leave(make_job: MakeJob, make_splits: MakeSplits) -> None:
    job = make_job(privacy={"mode": "sample", "noise": 1.0})
    replies = [ask(job, make_splits(1), bytes([i]) * 32) for i in range(4)]
    assert {(r.samples, r.steps, r.halvings, r.examples) for r in replies} == {(30, 4, 0, 30)}


def test_a_target_is_met_over_the_whole_run_at_each_site(make_job: MakeJob) -> None:
    job = make_job(privacy={"mode": "sample", "epsilon": 2.0}, federation={"rounds": 5}, train={"epochs": 2})
    for held in (30, 333):
        spends = [round_spend(job, r, Budget(epochs=2), [held]) for r in range(5)]
        assert 1.98 <= epsilon(spends, 1e-5) <= 2.0
    with pytest.raises(PrivacyError, match="asks for more training than the job says") as error:
        round_spend(job, 0, Budget(epochs=3), [30])
    assert error.value.code == "beyond-job"
    stream = make_job(
        privacy={"mode": "sample", "epsilon": 2.0}, time="continual", stream={"tasks": 2}, federation={"rounds": 4}
    )
    counts = [20, 50]
    spends = [round_spend(stream, r, Budget(epochs=2), counts) for r in range(4)]
    assert 1.98 <= epsilon(spends, 1e-5) <= 2.0


def test_delta_must_be_below_one_by_the_examples(make_job: MakeJob) -> None:
    job = make_job(privacy={"mode": "sample", "noise": 1.0, "delta": 0.04})
    assert round_spend(job, 0, Budget(epochs=1), [24]).noise == 1.0
    with pytest.raises(PrivacyError, match="is not below 1/25"):
        round_spend(job, 0, Budget(epochs=1), [25])


def test_fewer_steps_that_cost_more_are_beyond_the_target(make_job: MakeJob) -> None:
    """100 examples by 32: an epoch is 4 steps with rate 0.25, all but four of it 3 steps with rate 0.32."""
    job = make_job(privacy={"mode": "sample", "epsilon": 2.0}, train={"batch_size": 32})
    planned = round_spend(job, 0, Budget(epochs=1), [100])
    assert (planned.rate, planned.steps) == (0.25, 4)
    assert round_spend(job, 0, Budget(epochs=0.5), [100]).steps == 2
    assert epsilon([Spend(planned.noise, 0.32, 3)], 1e-5) > epsilon([planned], 1e-5)
    with pytest.raises(PrivacyError, match="asks for more training than the job says"):
        round_spend(job, 0, Budget(epochs=0.96), [100])


@pytest.mark.parametrize("round", [-1, 2, 1000])
@pytest.mark.parametrize("mode", ["sample", "client"])
def test_a_round_that_the_job_does_not_have(make_job: MakeJob, round: int, mode: str) -> None:
    job = make_job(privacy={"mode": mode, "noise": 1.0}, method={"name": "fedavg", "weighting": "uniform"})
    with pytest.raises(PrivacyError, match=f"round {round} is asked for, and job 'test' has rounds 0 to 1") as error:
        round_spend(job, round, Budget(epochs=1), [30])
    assert error.value.code == "beyond-job"


def test_delta_is_that_of_all_examples_of_a_stream(make_job: MakeJob) -> None:
    job = make_job(privacy={"mode": "sample", "noise": 1.0, "delta": 0.04}, time="continual", stream={"tasks": 2})
    assert round_spend(job, 0, Budget(epochs=1), [12, 12]).noise == 1.0
    with pytest.raises(PrivacyError, match="is not below 1/25"):
        round_spend(job, 0, Budget(epochs=1), [12, 13])


# ---- noise by the clients --------------------------------------------------------------------------------------------
def shares(make_job: MakeJob, **privacy: Any) -> Job:
    return make_job(
        privacy={"mode": "client", "noise": 3.0, "clip": 0.2, "noise_by": "clients", **privacy},
        method={"name": "fedavg", "weighting": "uniform"},
        federation={"min_sites": 4},
    )


def test_a_client_adds_its_share_to_its_clipped_update(make_job: MakeJob, make_splits: MakeSplits) -> None:
    silent, job = shares(make_job, noise=0), shares(make_job)
    start = torch.cat([t.flatten() for t in build_model(job)[0].state_dict().values()])
    clipped = flat(ask(silent, make_splits(1), b"a" * 32)) - start
    assert float(clipped.norm()) == pytest.approx(0.2, rel=1e-3)
    noise = (flat(ask(job, make_splits(1), b"a" * 32)) - start - clipped).double().numpy() / (3.0 * 0.2 / 2)
    low, high = stats.chi2.ppf([ERROR / 2, 1 - ERROR / 2], len(noise))
    assert low < float((noise**2).sum()) < high
    assert round_spend(job, 0, Budget(epochs=1), [30]) == Spend(1.5, 1.0, 1), "what it can vouch for alone"


def test_a_site_books_a_round_without_the_chance_that_it_was_not_asked(make_job: MakeJob) -> None:
    job = make_job(
        privacy={"mode": "client", "noise": 2.0}, method={"name": "fedavg", "weighting": "uniform"},
        federation={"fraction": 0.5},
    )  # fmt: skip
    assert round_spend(job, 0, Budget(epochs=1), [30]) == Spend(2.0, 1.0, 1)


def test_a_client_without_clip_and_noise_sends_its_model(make_job: MakeJob, make_splits: MakeSplits) -> None:
    quiet = ask(shares(make_job, noise=0, clip=0), make_splits(1), b"a" * 32)
    plain = ask(make_job(method={"name": "fedavg", "weighting": "uniform"}), make_splits(1), None)
    assert torch.equal(flat(quiet), flat(plain))
