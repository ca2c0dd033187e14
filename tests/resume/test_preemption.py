"""A run that is told to leave saves, ends with exit code 75, and goes on exactly, whatever it was doing."""

import functools
import json
import signal
import threading

import pytest

from rltoken import preemption
from rltoken.preemption import EXIT_CODE
from rltoken.resume import newest_whole
from tests.resume.phases import PHASES, at_call, logged, send

RUN = (
    "name=x", "eval.before=false", "eval.limit=2", "trainer.max_steps=3", "trainer.save_steps=100",
    "trainer.learning_rate=0.01", "trainer.warmup_steps=0", "reward.funcs.accuracy._target_=tests.resume.phases.parity",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """whole(cli, method): the run directory of a run in one piece."""

    @functools.cache
    def made(method):
        return tmp_path_factory.mktemp("whole")

    def get(cli, method):
        run = made(method) / "x"
        if not run.exists():
            found = cli(method, *RUN, f"runs_dir={run.parent}")
            assert found.status == 0, found.err
        return run

    return get


def weights(run):
    return (run / "final/model.safetensors").read_bytes()


def assert_equal(run, expected):
    assert weights(run) == weights(expected)
    assert logged(run) == logged(expected)
    assert json.loads((run / "report.json").read_text()) == json.loads((expected / "report.json").read_text())


@pytest.mark.parametrize(
    ("method", "phase", "count", "step"),
    [
        ("+exp=grpo", "generation", 2, 2),
        ("+exp=grpo", "grading", 2, 2),
        ("+exp=brpo", "forced answers", 2, 2),
        ("+exp=grpo", "backward", 2, 2),
        ("+exp=grpo", "generation", 3, 3),
        ("+exp=grpo", "saving", 1, 3),
    ],
)
def test_it_saves_the_step_leaves_and_goes_on_exactly(cli, whole, monkeypatch, method, phase, count, step):
    expected = whole(cli, method)
    with monkeypatch.context() as patch:
        at_call(patch, PHASES[phase], count, send)
        left = cli(method, *RUN)
    run = left.runs / "x"
    assert left.status == EXIT_CODE == 75, left.err
    assert left.err.splitlines()[-1] == (
        f"stopped by SIGTERM at step {step} of 3, saved in runs/x/checkpoint-{step}; the same command with resume=auto "
        "goes on"
    )
    assert newest_whole(run) == (run / f"checkpoint-{step}", [])
    assert len(list(run.glob("checkpoint-*"))) == 1 and not (run / "traceback.txt").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    resumed = cli(method, *RUN, "resume=auto")
    assert resumed.status == 0, resumed.err
    assert_equal(run, expected)


@pytest.mark.parametrize(
    ("phase", "setting", "kept"),
    [
        ("loading", "eval.before=false", "before training, nothing new to save"),
        ("evaluation", "eval.before=true", "before training, nothing new to save"),
        ("evaluation", "eval.before=false", "at step 3 of 3, saved in runs/x/checkpoint-3"),
    ],
)
def test_outside_training_it_leaves_at_once_and_goes_on_exactly(cli, whole, monkeypatch, phase, setting, kept):
    expected = whole(cli, "+exp=grpo")
    settings = ("+exp=grpo", *RUN, setting)
    with monkeypatch.context() as patch:
        at_call(patch, PHASES[phase], 1, lambda: send(signal.SIGUSR1))
        left = cli(*settings)
    run = left.runs / "x"
    assert left.status == EXIT_CODE and not (run / "traceback.txt").exists()
    assert left.err.splitlines()[-1] == f"stopped by SIGUSR1 {kept}; the same command with resume=auto goes on"
    assert not (run / "report.json").exists()
    resumed = cli(*settings, "resume=auto")
    assert resumed.status == 0, resumed.err
    assert weights(run) == weights(expected) and logged(run) == logged(expected)
    report, whole_report = (json.loads((folder / "report.json").read_text()) for folder in (run, expected))
    assert (report["after"], report["steps"]) == (whole_report["after"], 3)


@pytest.mark.parametrize("setting", ["trainer.save_strategy=no", "trainer.save_steps=1"])
def test_it_saves_once_whatever_the_strategy(cli, monkeypatch, setting):
    saves = []
    with monkeypatch.context() as patch:
        at_call(patch, PHASES["grading"], 2, send)
        for count in (1, 2, 3):
            at_call(patch, PHASES["saving"], count, lambda: saves.append(1))
        left = cli(*RUN, setting)
    assert left.status == EXIT_CODE, left.err
    assert newest_whole(left.runs / "x")[0].name == "checkpoint-2"
    assert len(saves) == (2 if setting == "trainer.save_steps=1" else 1)


def test_the_clock_stops_a_run_as_a_signal_does(cli, whole, monkeypatch):
    expected, ended = whole(cli, "+exp=grpo"), []
    with monkeypatch.context() as patch:
        at_call(patch, PHASES["backward"], 2, lambda: patch.setattr(preemption, "STARTED", -1e9))
        at_call(patch, "rltoken.callbacks.ProgressLine.on_train_end", 1, lambda: ended.append(True))
        left = cli("+exp=grpo", *RUN, "trainer.max_hours=200")
    assert left.status == EXIT_CODE and ended, "trackers are closed by this event"
    assert "stopped by trainer.max_hours=200 at step 2 of 3, saved in runs/x/checkpoint-2;" in left.err
    resumed = cli("+exp=grpo", *RUN, "trainer.max_hours=100", "resume=auto")
    assert resumed.status == 0, "another bound is no other run"
    assert_equal(left.runs / "x", expected)


@pytest.mark.parametrize("setting", ["max_hours=0", "max_hours=-1", "max_hours=soon", "enable_jit_checkpoint=true"])
def test_settings_that_make_no_sense_are_refused(cli, setting):
    found = cli(f"trainer.{setting}")
    assert found.status == 2 and found.err.startswith(f"error: trainer.{setting.partition('=')[0]}: ")


EVALUATED = ("trainer.eval_strategy=steps", "trainer.eval_steps=1", "eval.during.samples=1")
EPOCHS = ("trainer.logging_strategy=epoch", "data.train.n=4")  # of two steps each
BEST = ("trainer.save_strategy=best", "trainer.metric_for_best_model=own/problems", "trainer.greater_is_better=false")


@pytest.mark.parametrize(
    ("settings", "phase", "count", "step"),
    [
        pytest.param(EPOCHS, "generation", 2, 2, id="an epoch's end"),
        pytest.param(EVALUATED, "rltoken.trainer.TokenGRPOTrainer.evaluate", 2, 2, id="in an evaluation"),
        pytest.param((*EVALUATED, *BEST), "backward", 2, 2, id="before an evaluation", marks=pytest.mark.slow),
    ],
)
def test_epochs_and_evaluations_stay_exact(cli, monkeypatch, settings, phase, count, step):
    expected = cli(*RUN, *settings, "runs_dir=whole")
    assert expected.status == 0, expected.err
    with monkeypatch.context() as patch:
        at_call(patch, PHASES.get(phase, phase), count, send)
        left = cli(*RUN, *settings)
    assert left.status == EXIT_CODE and f"saved in runs/x/checkpoint-{step};" in left.err, left.err
    state = json.loads((left.runs / f"x/checkpoint-{step}/trainer_state.json").read_text())
    assert state["log_history"][-1]["step"] == step, "saved after what is logged at its end"
    assert cli(*RUN, *settings, "resume=auto").status == 0
    assert_equal(left.runs / "x", left.cwd / "whole/x")


def test_what_is_due_at_an_epochs_end_waits_for_it(cli, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, PHASES["generation"], 1, send)
        left = cli(*RUN, *EPOCHS)
    run = left.runs / "x"
    assert left.status == EXIT_CODE and newest_whole(run)[0].name == "checkpoint-1"
    assert not (run / "metrics.jsonl").exists()
    assert cli(*RUN, *EPOCHS, "resume=auto").status == 0
    assert [line["step"] for line in logged(run)] == [2, 3]


def test_a_second_sigterm_ends_the_process_but_an_echo_of_the_first_does_not(monkeypatch):
    ended = []
    monkeypatch.setattr(preemption, "_end_by", ended.append)
    with preemption.noticed(None) as notice, pytest.raises(preemption.Preempted), notice.steps(lambda: "at step 1"):
        send()
        send()
        send(signal.SIGUSR1)
        assert notice.asked() and not ended
        monkeypatch.setattr(preemption, "ECHO_SECONDS", 0.0)
        send(signal.SIGUSR1)
        assert not ended
        send()
        assert ended == [signal.SIGTERM]


def test_handlers_are_put_back_and_other_threads_install_none():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with pytest.raises(RuntimeError), preemption.noticed(None):
            assert signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN
            raise RuntimeError
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)
    found = []

    def elsewhere():
        with preemption.noticed(None) as notice:
            found.append((signal.getsignal(signal.SIGTERM), notice.asked()))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [(signal.SIG_DFL, False)]
