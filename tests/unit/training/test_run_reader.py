"""A run's folder as others read it: what was written, thinned, torn, begun anew."""

import json
import math
from contextlib import nullcontext

import pytest

from lora_gpt2.core.errors import Interrupted, NotFoundError
from lora_gpt2.training.run_reader import COLUMNS, Curves, RunReader, list_runs
from lora_gpt2.training.run_status import ALL, RunStatus, request_stop

LOSS, STEP = COLUMNS.index("loss"), COLUMNS.index("step")


def record(step, **more):
    return {
        "step": step,
        "tokens": 10 * step,
        "seconds": step / 4,
        "loss": 5 - step / 100,
        "learning_rate": 1e-3,
    } | more


def describe(*names):
    return {"adapters": [{"name": name, "num_steps": 10, "tokens_per_step": 64} for name in names]}


def write(folder, name, records, mode="a"):
    with (folder / f"{name}.metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(each) + "\n" for each in records)


@pytest.fixture
def run(tmp_path):
    with RunStatus(tmp_path).report(describe("law", "code")):
        write(tmp_path, "law", [record(1), record(2, validation_loss=4.0, sample="<b>")])
        yield RunReader(tmp_path)


@pytest.mark.parametrize("count", [1, 7, 8, 100, 1000, 1023])
def test_thinned_curves_keep_the_mean_and_the_order(count):
    curves = Curves(most_points=8)
    curves.add(record(step) for step in range(1, count + 1))
    shown = curves.to_json()
    assert len(shown["points"]) <= 16
    ends = [point[STEP] for point in shown["points"]] + ([count] if shown["open"] else [])
    assert ends[-1] == count
    sizes = [end - before for before, end in zip([0, *ends], ends, strict=False)]
    losses = [point[LOSS] for point in [*shown["points"], *([shown["open"]] if shown["open"] else [])]]
    total = sum(size * loss for size, loss in zip(sizes, losses, strict=True))
    assert total == pytest.approx(sum(5 - step / 100 for step in range(1, count + 1))), "nothing lost, nothing twice"


def test_skipped_steps_and_infinite_numbers_are_no_numbers():
    curves = Curves(most_points=8)
    curves.add([record(1, loss=None), record(2, loss=math.inf, gradient_norm=math.nan, validation_loss=math.nan)])
    json.dumps(curves.to_json(), allow_nan=False)
    assert [point[LOSS] for point in curves.points] == [None, None]


def test_the_step_before_the_first_is_measured_and_no_point():
    curves = Curves(most_points=8)
    curves.add([{"step": 0, "tokens": 0, "loss": None, "learning_rate": 0.0, "seconds": 0.0, "validation_loss": 3.0}])
    assert curves.points == []
    assert curves.validations[0][:2] == [0, 3.0]


def test_a_line_is_read_when_it_is_whole(run):
    path = run.folder / "law.metrics.jsonl"
    half = json.dumps(record(3))
    with path.open("a") as file:
        file.write(half[:20])
        file.flush()
        run.refresh()
        assert len(run.curves["law"].points) == 2
        file.write(half[20:] + "\nno json\n[1]\n")
    run.refresh()
    assert [point[STEP] for point in run.curves["law"].points] == [1, 2, 3]
    assert run.curves["code"].points == []


def test_a_file_that_is_written_anew_is_read_anew(run):
    before = run.generation
    write(run.folder, "law", [record(1)], mode="w")
    run.refresh()
    assert run.generation > before
    assert len(run.curves["law"].points) == 1


def test_another_run_in_the_same_folder_is_another_generation(run):
    before = run.generation
    with RunStatus(run.folder).report(describe("verse")):
        run.refresh()
    assert run.generation > before
    assert run.names == ["verse"]
    assert run.status["adapters"] == {}


def test_the_status_says_how_a_run_ends(tmp_path):
    def end(error=None):
        status = RunStatus(tmp_path)
        raised = pytest.raises(type(error)) if error else nullcontext()
        with raised, status.report(describe("law")):
            status.update({"law": ("training", "")})
            assert RunReader(tmp_path).status["state"] == "training"
            if error:
                raise error
        return RunReader(tmp_path).status

    assert end()["state"] == "done"
    stopped = end(Interrupted("stopped by SIGINT", "--resume continues", 2))
    assert (stopped["state"], stopped["message"]) == ("stopped", "stopped by SIGINT; --resume continues")
    assert stopped["adapters"] == {"law": ["training", ""]}
    assert end(ZeroDivisionError())["state"] == "failed"


def test_what_is_asked_is_heard_by_the_present_run_alone(tmp_path):
    request_stop(tmp_path, "law")
    status = RunStatus(tmp_path)
    with status.report(describe("law", "code")):
        assert status.poll_stop_requests() == set(), "that was meant for an earlier run"
        request_stop(tmp_path, "code")
        request_stop(tmp_path, ALL)
        assert status.poll_stop_requests() == set(), "it is looked up twice a second"
        status._polled = -math.inf
        assert status.poll_stop_requests() == {"code", ALL}


def test_runs_are_listed_newest_first_and_folders_without_one_are_none(tmp_path):
    import os

    for age, name in enumerate(("new", "old")):
        (tmp_path / name).mkdir()
        with RunStatus(tmp_path / name).report(describe(name)):
            pass
        for path in (tmp_path / name).iterdir():
            os.utime(path, (10**9 - age, 10**9 - age))
    (tmp_path / "other").mkdir()
    assert [path.name for path in list_runs(tmp_path)] == ["new", "old"]
    assert list_runs(tmp_path / "old") == [tmp_path / "old"]
    assert list_runs(tmp_path / "nowhere") == []
    with pytest.raises(NotFoundError) as caught:
        RunReader(tmp_path / "other")
    assert caught.value.hint


def test_a_second_ctrl_c_is_a_stop_and_no_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunStatus(tmp_path).report(describe("law")):
        raise KeyboardInterrupt
    assert RunReader(tmp_path).status["state"] == "stopped"
