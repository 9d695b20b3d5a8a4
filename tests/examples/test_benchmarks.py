"""The benchmark scripts measure what they say; nothing here looks at a time."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from lightning_hpo import named_hyperparameters

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Imports the scripts as they import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("_common", "_tasks", "breast_cancer", "overhead", "peers", "scaling", "starts")
    names += ("unattended",)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: __import__(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_stepper_moves_only_when_told(scripts):
    seen = []
    stepper = scripts["_common"].Stepper(lambda batches: seen.extend(batches), [0, 1, 2])
    assert seen == []
    stepper.advance(4)
    stepper.advance(1)
    stepper.close()
    # The list is complete after the end: extend() takes the batches one by one.
    assert seen == [1, 2, 0, 1, 2]


def test_stepper_reports_errors(scripts):
    def train(batches):
        next(iter(batches))
        raise KeyError("broken")

    stepper = scripts["_common"].Stepper(train, [0])
    with pytest.raises(KeyError, match="broken"):
        stepper.advance(2)


def test_peak_memory_sees_a_tensor_that_is_freed(scripts):
    common = scripts["_common"]
    if common.memory_problem("cpu"):
        pytest.skip(common.memory_problem("cpu"))

    def prepare(is_warmup):
        def train(batches):
            for step, _ in enumerate(batches):
                if step == 1:
                    torch.ones(2**15 if is_warmup else 32 * 2**20, dtype=torch.uint8)

        return train

    first, second = common.peak_memory(prepare, [0], (5, 10))
    assert 31.5 < first < 34.0
    assert second < 2.0


def test_an_interleaved_pair_takes_its_steps(scripts):
    common, overhead = scripts["_common"], scripts["overhead"]
    architecture = common.Architecture(lambda: common.mlp(8), 10, [])
    options = common.argparse.Namespace(device="cpu", threads=1, quick=True)
    bench = overhead.Bench(architecture, options)
    case = overhead.Case("L2", "T1T2", overhead.T1T2, 5, kinds=overhead.TIED)
    timing = bench.time(case, block=5)
    assert len(timing.baseline) == len(timing.method) == math.prod(bench.repeats.values())
    assert timing.ratio > 0


def test_every_case_can_be_made(scripts):
    common, overhead = scripts["_common"], scripts["overhead"]
    for architecture in common.ARCHITECTURES.values():
        for case in overhead.cases():
            tuned = overhead.make_module(architecture, case.kinds, is_tuned=True)
            plain = overhead.make_module(architecture, case.kinds, is_tuned=False)
            names = set(named_hyperparameters(tuned))
            fixed = set(named_hyperparameters(plain))
            assert names
            assert {n for n in names if not n.startswith("l2")} == fixed
            assert isinstance(case.estimator(), overhead.Estimator)


def test_the_floor_is_the_one_step_hypergradient(scripts):
    common, peers = scripts["_common"], scripts["peers"]
    data = common.make_data(20, 200)
    own = peers.our_hypergradients(1, data, 3)
    floor = peers.their_hypergradients(peers.train_floor, 1, data, 3)
    assert len(own) == 3
    assert all(own)
    assert floor == pytest.approx(own, rel=1e-10)


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_peers_agree_with_ours(scripts, name, k):
    pytest.importorskip(name)
    common, peers = scripts["_common"], scripts["peers"]
    data = common.make_data(20, 200)
    train = peers.LIBRARIES[name][2]
    own = peers.our_hypergradients(k, data, 3)
    assert peers.their_hypergradients(train, k, data, 3) == pytest.approx(own, rel=1e-10)


def test_what_is_not_installed_is_named(scripts, monkeypatch):
    peers = scripts["peers"]
    monkeypatch.setitem(peers.LIBRARIES, "nowhere", ("nowhere", "nowhere_at_all", None))
    found, missing = peers.find_libraries()
    assert "nowhere_at_all" in missing["nowhere"]
    assert {name.split()[0] for name in found} | set(missing) >= {"higher", "torchopt", "betty"}


# What unattended.py measures.


def test_axes_reach_two_decades_to_either_side(scripts):
    axis = scripts["_tasks"].Axis
    assert [axis(1e-3).at(k) for k in (-2, 0, 2)] == pytest.approx([1e-5, 1e-3, 1e-1])
    odds = [v / (1 - v) for v in (axis(0.2, "logit").at(k) for k in (-2, 0, 2))]
    assert odds == pytest.approx([0.0025, 0.25, 25.0], rel=1e-4)
    # A keep probability falls where regularization grows.
    odds = [v / (1 - v) for v in (axis(0.5, "keep").at(k) for k in (-2, 0, 2))]
    assert odds == pytest.approx([100.0, 1.0, 0.01], rel=1e-3)


def without_data(scripts):
    tasks = scripts["_tasks"].TASKS.values()
    return [task for task in tasks if not task.data]


def test_axes_are_the_hyperparameters_of_the_tasks(scripts):
    for task in without_data(scripts):
        module = task.make(task.at(0), 0, None).module
        named = {f"optimizer.{option}" for option in task.options} | {
            *named_hyperparameters(module)
        }
        assert named == {*task.axes}, task.name


def test_cells_start_where_they_say(scripts):
    unattended = scripts["unattended"]
    for task in without_data(scripts):
        start = task.starts()["low"]
        for configuration, is_frozen in {"fixed": True, "t1t2": False}.items():
            cell = unattended.Cell(task.name, 0, configuration, "low")
            module = unattended.prepare(unattended.Job(cell, start, {}, None, math.inf)).module
            for name, h in named_hyperparameters(module).items():
                values = h().flatten().tolist()
                assert values == pytest.approx([start[name]] * len(values), rel=1e-3)
                assert h.frozen is is_frozen


@pytest.mark.parametrize("configuration", ["fixed", "t1t2 every 10"])
def test_cells_can_start_where_the_package_says(scripts, configuration):
    unattended, tasks = scripts["unattended"], scripts["_tasks"]
    torch.set_default_dtype(torch.float32)  # as it is in a process of the benchmark

    @tasks.task("develop", {"optimizer.weight_decay": tasks.Axis(0.1)}, auto=True)
    def decay(values, seed, folder):
        problem = tasks.TASKS["digits-l2"].make({"l2": 1e-10}, seed, folder)
        problem.module.optimizer = tasks.adamw(2e-3)
        problem.module.steps = 30
        return problem

    try:
        for name, total in (("digits-l2", 0.02 / 0.1), ("decay", 2e-3)):
            task = tasks.TASKS[name]
            cell = unattended.Cell(name, 0, configuration, "auto")
            job = unattended.Job(cell, task.starts()["auto"], {}, None, math.inf)
            problem = unattended.prepare(job)
            problem.module.steps = 30
            callbacks = unattended.make_callbacks(job, problem)
            unattended.fit(problem.module, problem.train, 30, callbacks)
            (axis,) = task.axes
            found = unattended.summarize(problem.module, job)[axis]
            rates = sum(tasks.cosine(t, 30) for t in range(30))
            # Three updates move log λ by 0.05 each.
            moved = 1e-3 if configuration == "fixed" else 0.17
            assert found == pytest.approx(1 / (total * rates), rel=moved)
    finally:
        tasks.TASKS.pop("decay")


def test_training_sets_follow_the_seed_and_others_do_not(scripts):
    tasks = scripts["_tasks"]
    numbers = (torch.arange(100),)
    first, second = (tasks.split(numbers, seed, 40, 30, 20) for seed in (0, 1))
    assert [len(part) for part in first] == [40, 30, 20]
    assert len({int(n) for part in first for n in part.tensors[0]}) == 90
    assert not torch.equal(first[0].tensors[0], second[0].tensors[0])
    assert all(torch.equal(first[k].tensors[0], second[k].tensors[0]) for k in (1, 2))


@pytest.mark.parametrize("name", ["digits-l2", "digits-rate"])
def test_an_oracle_arrives_in_time_and_on_a_straight_line(scripts, name):
    unattended, tasks = scripts["unattended"], scripts["_tasks"]
    task = tasks.TASKS[name]
    start, target = task.at(-1), task.at(1)
    cell = unattended.Cell(name, 0, "oracle 1/4", "low")
    problem = unattended.prepare(unattended.Job(cell, start, target, None, math.inf))
    problem.module.float()  # as the data are; the tests make networks in float64
    seen = []

    class Watch(unattended.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            factor = tasks.cosine(trainer.global_step, problem.steps)
            rate = optimizer.param_groups[0]["lr"] / factor
            seen.append(rate if task.options else module.l2().item())

    oracle = unattended.Oracle(start, target, 10)
    unattended.fit(problem.module, problem.train, 15, [oracle, Watch()])
    middle = task.at(0)
    key = next(iter(task.axes))
    expected = [start[key], middle[key], target[key], target[key]]
    assert [seen[k] for k in (0, 5, 10, 14)] == pytest.approx(expected, rel=1e-4)


def made_up(scripts, tmp_path):
    """Results of digits-l2 with seed 0: a grid whose best value is 1e-3, and some cells."""
    unattended = scripts["unattended"]
    results = unattended.Results(tmp_path / "results.csv")

    def add(configuration, start, loss, seconds=2.0, status="ok"):
        row = {"task": "digits-l2", "seed": 0, "configuration": configuration, "start": start}
        row |= {"validation": loss, "test": loss, "seconds": seconds, "parameters": 10}
        results.append(row | {"status": status, "final": json.dumps({})})

    for k, name in enumerate(scripts["_tasks"].TASKS["digits-l2"].grid()):
        add("fixed", name, 1 + abs(k - 4) / 10)
    add("default", "low", 1.1, 8.0)
    add("default", "high", 2.8)
    add("default", "sensible", 0.9, 60.0, "slow")
    for draw in range(unattended.DRAWS):
        add("random", f"draw {draw:02}", 2.0 - draw / 10)
    return results


def test_cells_are_judged_by_the_grid_and_by_their_start(scripts, tmp_path):
    unattended = scripts["unattended"]
    tasks = [scripts["_tasks"].TASKS["digits-l2"]]
    results = made_up(scripts, tmp_path)
    low, high = unattended.collect("default", ["low", "high"], tasks, results)
    assert (low.regret, low.cost, low.is_worse) == (pytest.approx(0.1), 4.0, False)
    assert (high.regret, high.is_worse) == (pytest.approx(1.8), True)
    (slow,) = unattended.collect("default", ["sensible"], tasks, results)
    assert math.isinf(slow.regret)
    assert slow.is_worse
    alone = unattended.collect("fixed", ["sensible", "low"], tasks, results)
    assert [outcome.regret for outcome in alone] == pytest.approx([0.0, 0.4])


def test_random_search_takes_the_best_of_its_draws(scripts, tmp_path):
    unattended = scripts["unattended"]
    tasks = [scripts["_tasks"].TASKS["digits-l2"]]
    results = made_up(scripts, tmp_path)
    found = {n: unattended.search(n, tasks, results) for n in unattended.counts()}
    assert [len(found[n]) for n in (1, 2, 4, 8, 16)] == [16, 8, 4, 2, 1]
    assert [outcome.regret for outcome in found[8]] == pytest.approx([0.3, -0.5])
    assert {outcome.cost for outcome in found[8]} == {8}


def test_results_are_read_again_and_not_made_again(scripts, tmp_path, monkeypatch):
    unattended = scripts["unattended"]
    task = scripts["_tasks"].TASKS["digits-l2"]
    first = made_up(scripts, tmp_path)
    second = unattended.Results(first.path)
    assert second.rows == first.rows
    jobs = list(unattended.list_jobs("default", task, 0, second, None))
    left = [job.cell.start for job in jobs if job.cell not in second.rows]
    assert left == [k for k in task.starts() if k == "auto" or k.startswith("1e")]
    jobs = [job for job in jobs if job.cell in second.rows]
    assert len(jobs) == 3

    def refuse(*arguments):
        raise AssertionError("a cell that is there is trained again")

    monkeypatch.setattr(unattended, "ProcessPoolExecutor", refuse)
    assert unattended.run_all(jobs, second, 1)


def test_reports_have_a_line_for_each_configuration(scripts, tmp_path, capsys):
    unattended = scripts["unattended"]
    results = made_up(scripts, tmp_path)
    unattended.report([scripts["_tasks"].TASKS["digits-l2"]], results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text == capsys.readouterr().out[:-1]
    assert "| default | 2 | +10.0 % | +180.0 % | +180.0 % | +10.0 % | 1 | 2.50 | – |" in text
    assert "| 16 | 1 | -50.0 % |" in text
    assert (tmp_path / "develop.png").stat().st_size > 0


def test_starts_are_tuned_beside_a_grid(scripts, monkeypatch, tmp_path, capsys):
    starts, threads = scripts["starts"], torch.get_num_threads()
    monkeypatch.setattr(starts, "STARTS", [1e-7, 1e-3])
    monkeypatch.setattr(starts, "GRID", [1e-4, 1e-2])
    monkeypatch.setattr(starts, "STEPS", 300)
    picture = tmp_path / "starts.png"
    monkeypatch.setattr(sys, "argv", ["starts.py", "--out", str(picture)])
    torch.set_default_dtype(torch.float32)  # as it is in a process of the script
    try:
        starts.main()
    finally:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(line.split()[1:4]): line.split()[4:] for line in lines if line.startswith("λ ")}
    assert rows["fixed", "at", "1.0e-04"][-1] == "1.0e-04"
    assert rows["tuned", "from", "1.0e-07"][-1] == "(replaced)"
    assert rows["tuned", "from", "1.0e-03"][-1] not in {"1.0e-03", "(replaced)"}
    assert picture.stat().st_size > 5000


def test_a_task_is_tuned_beside_what_is_left_alone(scripts, monkeypatch, capsys):
    cancer, threads = scripts["breast_cancer"], torch.get_num_threads()
    monkeypatch.setattr(cancer, "GRID", [1e-4, 1e-1])
    monkeypatch.setattr(sys, "argv", ["breast_cancer.py", "--seeds", "1", "--steps", "100"])
    torch.set_default_dtype(torch.float32)
    try:
        cancer.main()
    finally:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[2:]] == [
        [optimizer, seed] for optimizer in ("SGD", "Adam") for seed in ("0", "mean")
    ]
    for row in (rows[2], rows[4]):
        best, worst, *_ = (float(cell.split()[0]) for cell in row[2:7])
        assert best < worst
        start, end = map(float, row[7].split("; "))
        assert start > 0
        assert start != pytest.approx(end, rel=0.05)


def test_best_of_so_many_that_are_drawn(scripts):
    starts = scripts["starts"]
    results = [starts.Result(0.0, loss, 2 * loss, 1.0, []) for loss in (3.0, 1.0, 2.0)]
    assert starts.best_of(results, 1) == pytest.approx((2.0, 4.0))
    # Of the three pairs, two hold the 1 and one has 2 as its best.
    assert starts.best_of(results, 2) == pytest.approx((4 / 3, 8 / 3))
    assert starts.best_of(results, 3) == pytest.approx((1.0, 2.0))
