"""Folders of a comparison's runs, and the order in which they are made, stopped and gone on with."""

import logging
import os
import signal
from pathlib import Path

import pytest
from tiny import save_student, save_teacher, write_pairs

from flipkd_dist import comparison_runs
from flipkd_dist.comparison_rows import chosen_rows, planned_runs
from flipkd_dist.comparison_runs import STAGE, Runner, make_run, place_runs
from flipkd_dist.config import RunConfig, validate
from flipkd_dist.console import log_file, logging_to, set_up_logging
from flipkd_dist.errors import StoppedAtOnce, StoppedOnRequest, UserError


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("runs")
    data = {split: write_pairs(folder / f"{split}.jsonl", 12, i) for i, split in enumerate(("train", "test"))}
    return validate(
        {
            "name": "tiny",
            "output_dir": str(folder / "runs"),
            "data": {**data, "max_length": 64},
            "teacher": {"model_name_or_path": str(save_teacher(folder / "teacher")), "max_length": 32},
            "student": {
                "model_name_or_path": str(save_student(folder / "student")),
                "prompt": "same ? {text_a} | {text_b} =",
                "answers": ["yes", "no"],
            },
            "distributed": {"deepspeed": None},
        },
        "test",
    )


def placed(config: RunConfig, folder: Path, names=("lora_sup", "flip"), seeds: int = 2, **options):
    return place_runs(planned_runs(config, chosen_rows(config, names, **options), seeds), folder)


def changed(config: RunConfig, **changes) -> RunConfig:
    sections = {
        section: getattr(config, section).model_copy(update=values)
        for section, values in changes.items()
        if isinstance(values, dict)
    }
    return config.model_copy(update=changes | sections)


def test_a_folder_changes_with_whatever_changes_the_run(config, tmp_path):
    def names(changed_config: RunConfig, **options) -> list[str]:
        return [run.folder.path.name for run in placed(changed_config, tmp_path, **options)]

    before = names(config)
    assert [name[:-8] for name in before] == ["lora_sup-seed42-", "flip-seed42-", "lora_sup-seed43-", "flip-seed43-"]
    assert len(set(before)) == 4 and names(config) == before
    other_data = write_pairs(tmp_path / "other.jsonl", 12, 9)
    for change in ({"train": {"learning_rate": 1e-3}}, {"data": {"train": other_data}}, {"data": {"test": other_data}}):
        assert not set(names(changed(config, **change))) & set(before), change
    assert names(changed(config, train={"logging_steps": 1, "test_checkpoints": 2})) == before
    margin = names(config, settings=["flip.loss.margin=0.5"])
    assert margin[::2] == before[::2] and not set(margin[1::2]) & set(before)


def test_a_finished_run_is_finished_for_its_number_of_checkpoints(config, tmp_path):
    run, *_ = placed(config, tmp_path)
    run.folder.open()
    run.folder.mark_done(STAGE, run.key)
    again = placed(config, tmp_path)
    assert [one.is_finished for one in again] == [True, False, False, False]
    averaged = placed(changed(config, train={"test_checkpoints": 3}), tmp_path)
    assert averaged[0].folder.path == run.folder.path and not averaged[0].is_finished


def test_what_classic_learns_depends_on_its_teacher(config, tmp_path):
    def folders(**options) -> list[str]:
        return [run.folder.path.name for run in placed(config, tmp_path, ["classic"], 1, **options)]

    (sup, classic), (other_sup, other) = folders(), folders(settings=["lora_sup.train.max_steps=7"])
    assert sup != other_sup and classic != other


def test_a_mistake_names_its_row(config, tmp_path):
    rows = chosen_rows(config, ["flip"], settings=["flip.student.model_name_or_path=nowhere"])
    with pytest.raises(UserError, match=r"^row flip: student\.model_name_or_path = nowhere: "):
        place_runs(planned_runs(config, rows, 1), tmp_path)


class FakeTasks:
    """Ends the oldest call at each look, as its row's outcome says."""

    outcomes: dict[str, object] = {}  # noqa: RUF012
    at_look: list = []  # noqa: RUF012

    def __init__(self, function):
        assert function is make_run
        self.running, self.log, self.computing, self.most = {}, [], [], 0

    def start(self, run, config, computes, ends_process, values, kind, taught_by, key):
        assert ends_process == (kind == "classic")  # an encoder's trainer leaves a gigabyte behind
        self.computing += [run.name] if computes else []
        assert validate(values, "test") == run.config
        run.folder.open()
        self.log.append((run.name, Path(taught_by).name if taught_by else None))
        self.running[run.name] = run
        self.most = max(self.most, len(self.running))

    def ended(self, timeout_s):
        if not self.running:
            return []
        if self.at_look:
            self.at_look.pop(0)(self)
        run = self.running.pop(next(iter(self.running)))
        result = self.outcomes.get(run.name, ("done", ""))
        if run.folder.stop.exists() and result == ("done", ""):
            result = ("stopped", "")
        if result == ("done", ""):
            run.folder.mark_done(STAGE, run.key)
        return [(run, result)]


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.setattr(comparison_runs, "Tasks", FakeTasks)
    monkeypatch.setattr(FakeTasks, "outcomes", {})
    monkeypatch.setattr(FakeTasks, "at_look", [])
    return FakeTasks


def runner(runs, at_once=2):
    notes = []
    made = Runner(runs, at_once, lambda: notes.append([run.status for run in runs]))
    made.notes = notes
    return made


def test_as_many_at_once_as_there_is_room_and_finished_ones_never_again(config, tmp_path, tasks):
    runs = placed(config, tmp_path)
    first = runner(runs)
    first.run()
    assert [name for name, _ in first.tasks.log] == [run.name for run in runs] and first.tasks.most == 2
    assert first.notes[-1] == ["done"] * 4
    again = runner(placed(config, tmp_path))
    again.run()
    assert again.tasks.log == []


def test_a_failure_stops_nobody_but_who_is_taught_by_it(config, tmp_path, tasks):
    tasks.outcomes.update(
        {"lora_sup seed 42": ("failed", "no memory"), "flip seed 43": RuntimeError("its\nprocess died")}
    )
    runs = placed(config, tmp_path, ["flip", "classic"])
    made = runner(runs, 4)
    made.run()
    found = {run.name: (run.status, run.reason) for run in runs}
    assert found["lora_sup seed 42"] == ("failed", "no memory")
    assert found["classic seed 42"] == ("failed", "lora_sup of the same seed has failed")
    assert found["flip seed 43"][0] == "failed" and "its process died" in found["flip seed 43"][1]
    assert found["classic seed 43"] == found["flip seed 42"] == ("done", "")
    [taught_by] = [teacher for name, teacher in made.tasks.log if name == "classic seed 43"]
    assert taught_by == next(run.config.name for run in runs if run.name == "lora_sup seed 43")
    assert runs[0].entry(tmp_path)["reason"] == "no memory" and runs[0].entry(tmp_path)["status"] == "failed"


def test_a_run_that_is_stopped_by_itself_leaves_the_table_unfinished(config, tmp_path, tasks):
    tasks.outcomes["lora_sup seed 42"] = ("stopped", "")
    runs = placed(config, tmp_path, ["flip", "classic"])
    with pytest.raises(StoppedOnRequest, match="with 4 of 6 runs finished"):
        runner(runs).run()
    found = {run.name: run.status for run in runs if run.status != "done"}
    assert found == {"lora_sup seed 42": "stopped", "classic seed 42": "stopped"}
    tasks.outcomes.clear()
    last = runner(placed(config, tmp_path, ["flip", "classic"]))
    last.run()
    assert [name for name, _ in last.tasks.log] == ["lora_sup seed 42", "classic seed 42"]


def test_who_computes_in_the_task_takes_a_workers_resources(config, tmp_path, tasks):
    """The encoder of `classic` learns in the task itself, whatever the students do."""
    for settings, computing in (
        ({}, ["lora_sup seed 42", "flip seed 42", "classic seed 42"]),
        ({"num_workers": 2, "deepspeed": "ds_configs/zero3.json"}, ["classic seed 42"]),
    ):
        made = runner(placed(changed(config, distributed=settings), tmp_path, ["flip", "classic"], 1))
        made.run()
        assert made.tasks.computing == computing


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop_every_run_in_work_is_asked_and_no_other_begins(config, tmp_path, tasks, number):
    tasks.at_look[:] = [lambda _: None, lambda _: os.kill(os.getpid(), number)]
    runs = placed(config, tmp_path)
    made, before = runner(runs), signal.getsignal(number)
    with pytest.raises(StoppedOnRequest, match="stopped on request with 2 of 4 runs finished: run the same command"):
        made.run()
    assert [run.status for run in runs] == ["done", "done", "stopped", "waiting"]
    assert signal.getsignal(number) is before
    last = runner(placed(config, tmp_path))
    last.run()
    assert [name for name, _ in last.tasks.log] == ["lora_sup seed 43", "flip seed 43"]


def test_asked_twice_it_waits_for_nobody(config, tmp_path, tasks):
    tasks.at_look[:] = [lambda _: (os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGTERM))]
    with pytest.raises(StoppedAtOnce):
        runner(placed(config, tmp_path)).run()


def test_a_run_that_fails_tells_why_and_its_log_has_the_rest(config, tmp_path, monkeypatch):
    def fail(*_):
        logging.getLogger("flipkd_dist").info("about to")
        raise ValueError("too\nmuch")

    [run, *_] = placed(config, tmp_path)
    monkeypatch.setattr(comparison_runs, "_make", fail)
    assert make_run(run.config.model_dump(mode="json"), "student", None, "k") == ("failed", "ValueError: too much")
    log = (run.folder.path / "run.log").read_text()
    assert "about to" in log and "Traceback" in log and not run.folder.done(STAGE, "k")

    def stop(*_):
        raise StoppedOnRequest("stopped at 3")

    monkeypatch.setattr(comparison_runs, "_make", stop)
    assert make_run(run.config.model_dump(mode="json"), "student", None, "k") == ("stopped", "stopped at 3")
    monkeypatch.setattr(comparison_runs, "_make", lambda *_: None)
    assert make_run(run.config.model_dump(mode="json"), "student", None, "k") == ("done", "")
    assert run.folder.done(STAGE, "k")


def test_messages_go_to_a_file_and_back_to_the_screen(tmp_path):
    set_up_logging()
    logger = logging.getLogger("flipkd_dist")
    before = list(logger.handlers)
    with logging_to(str(tmp_path / "run.log")):
        logger.info("inside")
        assert log_file() == str(tmp_path / "run.log")
    assert logger.handlers == before and log_file() is None
    assert (tmp_path / "run.log").read_text().endswith(" inside\n")
