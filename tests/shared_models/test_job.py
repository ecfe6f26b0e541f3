"""A job file: what is refused and in which words, what the hash covers, and how a stream cuts the labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared_models.errors import ConfigError, UnknownNameError
from shared_models.job import Job

MakeJob = Callable[..., Job]

FILE = """\
name = "first"

[model]
name = "cnn"

[task]
labels = ["cat", "dog", "bird"]

[data]
shape = [3, 16, 16]

[train]
lr = 0.1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "job.toml"
    found.write_text(FILE)
    return found


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        Job.load(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_loaded_job_holds_every_setting_of_what_it_chose(path: Path) -> None:
    job = Job.load(path, ["method.name=fedprox"])
    assert job.train.lr == 0.1
    assert job.train.batch_size == 32
    assert job.model.keys == {"size": "tiny", "channels": (16, 32), "kernel": 3, "padded": True, "hidden": (64,)}
    assert job.method.keys == {"mu": 0.01, "weighting": "examples"}
    task = json.loads(job.canonical)["task"]
    assert {"name": "classification", "labels": ["cat", "dog", "bird"], "headline": None}.items() <= task.items()


def test_broken_toml_names_file_and_line(path: Path) -> None:
    path.write_text('name = "x"\n\n[model\n')
    assert "job.toml is not valid TOML" in refused(path)
    assert "line 3" in refused(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.toml").startswith(f"there is no {tmp_path / 'none.toml'}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=cnm", "unknown model 'cnm'. did you mean "),
        ("model.name=7", "'model.name' should be a valid string, not 7"),
        ("model.size=huge", "[model]: model 'cnn' has no size 'huge'. known: mcmahan, niid-bench, tiny"),
        ("model.kernl=5", "[model] cnn: unknown key 'kernl', did you mean 'kernel'?"),
        ("method.name=fedprix", "unknown method 'fedprix'. did you mean 'fedprox'"),
        ("method={name='fedavg', mu=1}", "job.toml: [method]: unknown key 'mu', known: weighting"),
        ("continual.name=finetun", "unknown method 'finetun'. did you mean 'finetune'"),
        ("task.name=clasification", "unknown task 'clasification'. did you mean 'classification'"),
        ("task.topk=5", "job.toml: [task]: unknown key 'topk'"),
        ("trian.lr=1", "job.toml: unknown key 'trian', did you mean 'train' or 'stream' or 'privacy'?"),
        ("train.learning=1", "job.toml: unknown key 'train.learning'"),
        ("train.optimiser=sgd", "job.toml: unknown key 'train.optimiser', did you mean 'optimizer'?"),
        ("train.lr=-1", "job.toml: 'train.lr' should be greater than 0, not -1"),
        ("train.lr=fast", "job.toml: 'train.lr' should be a valid number"),
        ("train.lr=inf", "job.toml: 'train.lr' should be a finite number, not inf"),
        ("data.mean=[nan]", "job.toml: 'data.mean.0' should be a finite number, not nan"),
        ("federation.max_update_norm=inf", "'federation.max_update_norm' should be a finite number"),
        ("method={name='fedprox', mu=inf}", "[method]: 'mu' should be a finite number, not inf"),
        ("train=5", "job.toml: 'train' should be a table of settings"),
        ("place=hospital", "'place' should be 'centralized', 'isolated' or 'federated', not 'hospital'"),
        ("name=../x", "job.toml: 'name'"),
        ('name="x\\n"', "job.toml: 'name'"),
        ('task.labels=["a"]', "job.toml: [task]: 'labels': there is nothing to choose with one label alone, 'a'"),
        ('task.labels=["a","a"]', "'task': a label stands twice in the list"),
        ("data.shape=[2, 8, 8]", "job.toml: 'data.shape': an image has 1 (grey) or 3 (colour) channels, not 2"),
        ("data.std=[0.5, 0.5]", "'data': mean and std need one number, or one per channel or feature (3)"),
        ("data.std=[0]", "'data.std.0' should be greater than 0, not 0"),
    ],
)
def test_what_cannot_be_is_one_line_with_its_place(path: Path, override: str, message: str) -> None:
    assert message in refused(path, override)


def test_an_unknown_name_has_its_own_type(path: Path) -> None:
    with pytest.raises(UnknownNameError):
        Job.load(path, ["model.name=cnm"])


def test_set_overrides_with_toml_values_bare_words_lists_and_new_tables(path: Path) -> None:
    job = Job.load(
        path,
        [
            "train.lr=0.2",
            "train.lr = 0.3",
            "time=offline",
            "stream.tasks=2",
            'name="b=c"'.replace("=c", "-c"),
            "train.deterministic=false",
            'share.personal=["head.*", "hidden1.*"]',
            "data.mean=[0.1, 0.2, 0.3]",
            "federation={rounds = 5, min_sites = 2}",
            "federation.fraction=0.5",
        ],
    )
    assert job.train.lr == 0.3
    assert (job.time, job.name, job.train.deterministic) == ("offline", "b-c", False)
    assert job.share.personal == ("head.*", "hidden1.*")
    assert job.data.mean == (0.1, 0.2, 0.3)
    assert (job.federation.rounds, job.federation.min_sites, job.federation.fraction) == (5, 2, 0.5)


def test_set_splits_at_the_first_equals_sign_only(path: Path) -> None:
    assert Job.load(path, ['simulation.root="a=b"']).simulation.root == "a=b"
    assert Job.load(path, ["simulation.root=a=b"]).simulation.root == "a=b"


@pytest.mark.parametrize("override", ["train.lr", "=1", ".lr=1", "train.=1", "train..lr=1", ""])
def test_set_of_the_wrong_form_says_the_right_one(path: Path, override: str) -> None:
    assert refused(path, override) == f"--set {override!r} is not of the form table.key=value. E.g. --set train.lr=0.1"


def test_set_below_a_value_is_refused(path: Path) -> None:
    assert refused(path, "train.lr.x=1") == "--set 'train.lr.x=1': 'lr' is a value, not a table"


def test_set_of_a_number_too_long_for_python_is_one_line(path: Path) -> None:
    assert "'seed'" in refused(path, "seed=" + "9" * 5000)


def test_the_hash_covers_everything_but_the_simulation(make_job: MakeJob) -> None:
    base = make_job()
    assert len(base.hash) == 64
    assert make_job().hash == base.hash
    same = make_job(simulation={"reader": "imagefolder", "root": "/data", "sites": 7, "seed": 3})
    assert same.hash == base.hash
    assert same.simulation != base.simulation
    others: list[dict[str, Any]] = [
        {"name": "other"},
        {"seed": 1},
        {"place": "isolated"},
        {"time": "continual", "stream": {"tasks": 2}},
        {"model": {"name": "logistic"}},
        {"model": {"hidden": [7]}},
        {"task": {"labels": [str(c) for c in reversed(range(10))]}},
        {"data": {"resize": "pad"}},
        {"data": {"mean": [0.4]}},
        {"method": {"name": "fedprox"}},
        {"method": {"name": "fedprox", "mu": 0.5}},
        {"method": {"name": "fedavg", "weighting": "uniform"}},
        {"share": {"personal": ["head.*"]}},
        {"share": {"base": ["head.*"]}},
        {"train": {"steps": 3}},
        {"train": {"deterministic": False}},
        {"federation": {"max_update_norm": 5.0}},
        {"federation": {"select": "best"}},
        {"stream": {"tasks": 2}},
        {"privacy": {"mode": "sample", "epsilon": 3.0}},
        {"privacy": {"mode": "sample", "noise": 3.0}},
    ]
    hashes = [make_job(**other).hash for other in others]
    assert len({base.hash, *hashes}) == len(others) + 1


def test_a_value_written_another_way_is_the_same_job(make_job: MakeJob) -> None:
    assert make_job(train={"epochs": 1}).hash == make_job(train={"epochs": 1.0}).hash
    assert make_job(model={"size": "tiny"}).hash == make_job().hash  # a default that is spelled out


def test_the_hash_never_changes_by_accident() -> None:
    data = {
        "name": "pinned",
        "model": {"name": "logistic"},
        "task": {"labels": ["a", "b"]},
        "data": {"shape": [1, 2, 2]},
    }
    job = Job.resolve(data)
    assert job.canonical == (
        '{"augment":{"brightness":0.0,"contrast":0.0,"crop":0,"flip":false,"flip_vertical":false,'
        '"quarter_turns":false,"rotate":0.0,"scale":0.0},"continual":{"name":"finetune"},"data":{"captions":1,'
        '"cut":"lines","features":[],'
        '"mean":[0.5],"missing":"drop","normalise_by":"job","parts":"hash","proposals":300,"resize":"stretch",'
        '"shape":[1,2,2],"std":[0.5],"stride":0,"target":"label","text":["text"],"text_length":64,"tile":[],'
        '"tokenizer":"","train_share":1.0},"federation":{"fraction":1.0,"max_update_norm":1000000.0,'
        '"min_sites":1,"round_timeout":3600.0,"rounds":10,"select":"last","wait":86400.0},'
        '"lora":{"alpha":16.0,"rank":0,"targets":[],"train":"b"},'
        '"method":{"name":"fedavg","weighting":"examples"},"model":{"name":"logistic","size":"tiny"},'
        '"name":"pinned","place":"federated","privacy":{"accountant":"rdp","clip":1.0,"clip_rate":0.2,"delta":1e-05,'
        '"epsilon":0.0,"gradients":"auto","mechanism":"gaussian","mode":"none","noise":null,"noise_by":"server",'
        '"quantile":0.0,"sampling":"poisson"},"seed":0,"share":{"base":[],"personal":[]},"stages":[],'
        '"stream":{"amount":null,"kind":"classes","order":"shared","sites":[],"stay":false,"tasks":5},'
        '"task":{"aliases":{},"class_weights":[],"headline":null,"label_smoothing":0.0,"labels":["a","b"],'
        '"name":"classification"},"time":"offline","train":{"accumulate":1,"batch_size":32,"clip":0.0,'
        '"deterministic":true,"epochs":1.0,"lr":0.05,"momentum":0.0,"optimizer":"sgd","precision":"fp32",'
        '"schedule":"constant","steps":null,"warmup":0.0,"weight_decay":0.0},"weights":{"file":"","rename":[],'
        '"sha256":""}}'
    )


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"model": {"name": "cnn", "size": "niid-bench", "hidden": []}, "data": {"shape": [3, 32, 32]}},
        {"train": {"steps": 4, "lr": 1e-3}, "method": {"name": "fedprox", "mu": 0.25}},
        {"share": {"personal": ["head.*"]}, "simulation": {"root": "$HOME/ä\n", "alpha": 0.1}},
        {"time": "continual", "task": {"labels": ['"', "\\", "é"]}, "stream": {"tasks": 2}},
    ],
)
def test_the_written_job_loads_to_the_same_job(make_job: MakeJob, tmp_path: Path, parts: dict[str, Any]) -> None:
    job = make_job(**parts)
    (tmp_path / "job.toml").write_text(job.to_toml(), encoding="utf-8")
    again = Job.load(tmp_path / "job.toml")
    assert again.hash == job.hash
    assert again.simulation == job.simulation
    assert Job.resolve(json.loads(job.canonical)).hash == job.hash  # what a node makes of an instruction


def test_a_job_cannot_be_changed_in_place(make_job: MakeJob) -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_job().train.lr = 1.0


def test_replace_changes_keys_of_a_part_and_keeps_the_rest(make_job: MakeJob) -> None:
    job = make_job(method={"name": "fedprox", "mu": 0.5, "weighting": "uniform"})
    changed = job.replace(seed=3, train={"lr": 0.7}, method={"mu": 0.25})
    assert (changed.seed, changed.train.lr, changed.train.batch_size) == (3, 0.7, 8)
    assert changed.method.keys == {"mu": 0.25, "weighting": "uniform"}
    assert (job.seed, job.train.lr, job.method.keys["mu"]) == (0, 0.1, 0.5)
    assert job.replace().hash == job.hash


def test_replace_by_another_name_drops_the_old_settings(make_job: MakeJob) -> None:
    job = make_job(method={"name": "fedprox", "mu": 0.5, "weighting": "uniform"})
    assert job.replace(method={"name": "scaffold"}).method.keys == {"weighting": "examples", "server_lr": 1.0}
    assert job.replace(model={"name": "logistic"}).model.keys == {"size": "tiny"}


def test_replace_by_another_size_takes_that_sizes_settings(make_job: MakeJob) -> None:
    job = make_job(model={"name": "cnn"}, data={"shape": [3, 32, 32]})
    expected = make_job(model={"name": "cnn", "size": "niid-bench"}, data={"shape": [3, 32, 32]})
    assert job.replace(model={"size": "niid-bench"}).model == expected.model
    assert expected.model.keys["channels"] == (6, 16)


def test_replace_refuses_what_load_refuses(make_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'train\.x'"):
        make_job().replace(train={"x": 1})
    with pytest.raises(ConfigError, match="unknown key 'trian'"):
        make_job().replace(trian={"lr": 1})


@pytest.mark.parametrize(
    ("labels", "tasks", "expected"),
    [
        (10, 5, ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))),
        (3, 2, ((0, 1), (2,))),
        (5, 2, ((0, 1), (2, 3, 4))),
        (4, 4, ((0,), (1,), (2,), (3,))),
        (4, 1, ((0, 1, 2, 3),)),
    ],
)
def test_a_stream_cuts_the_labels_in_order(
    make_job: MakeJob, labels: int, tasks: int, expected: tuple[tuple[int, ...], ...]
) -> None:
    parts = {"task": {"labels": [f"l{i}" for i in range(labels)]}, "stream": {"tasks": tasks}}
    job = make_job(time="continual", federation={"rounds": 10}, **parts)
    assert job.tasks == expected
    assert job.replace(time="offline").tasks == (tuple(range(labels)),)


def test_every_stream_gives_every_class_to_one_task(make_job: MakeJob) -> None:
    base = make_job(model={"name": "logistic"}, federation={"rounds": 30})
    for labels in range(2, 24):
        for tasks in range(1, labels + 1):
            job = base.model_copy(
                update={
                    "time": "continual",
                    "task": base.task.model_copy(update={"labels": tuple(map(str, range(labels)))}),
                    "stream": base.stream.model_copy(update={"tasks": tasks}),
                }
            )
            assert len(job.tasks) == tasks
            assert all(job.tasks)
            assert [c for task in job.tasks for c in task] == list(range(labels))
            assert max(map(len, job.tasks)) - min(map(len, job.tasks)) <= 1
