"""Training as a process of its own: whoever starts, follows or dies, no process is left and nothing is lost.

The trainer is stood in for by a script that uses the same two calls (`child_setup`, `RunWriter.open`) and whose last
argument is the run directory; `test_train.py` has the real one.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from refine_lab.config import TrainConfig
from refine_lab.runs import process as runs_process
from refine_lab.runs.child import watch_parent
from refine_lab.runs.environment import project_root
from refine_lab.runs.process import RunProcess, attach, follow, resume, start, stop
from refine_lab.runs.run import Run, list_runs
from refine_lab.runs.writer import RunWriter

ENVIRON = {"PYTHONPATH": str(project_root())}  # for processes that `runs.process` does not start

TRAINER = """
import os, signal, sys, time
signal.alarm(300)  # it is detached in some tests: no crash of theirs leaves it behind
from refine_lab.runs import child
child.SAVE_SECONDS = 5.0
(stop,) = child.child_setup(sys.argv[-1])
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter

mode, path = sys.argv[1:]
last = (Run(path).latest_checkpoint() or (None,))[0]
with RunWriter.open(path, last) as writer:
    step = last or 0
    writer.status("running", step)
    while step < writer.config.steps and not stop.requested():
        step += 1
        time.sleep(0.01)
        writer.train(step, {"ntp_loss": 1 / step, "tokens_per_second": 5000.0})
        writer.status("running", step, seconds_left=61.0)
        if mode == "fails" and step == 3:
            writer.status("failed", step, error="ValueError: the loss is nan")
            sys.exit(1)
        if mode == "crashes" and step == 3:
            raise ZeroDivisionError("a step of nothing")
        if mode == "hangs" and step == 3:
            time.sleep(600)
    with writer.checkpoint(step) as folder:
        time.sleep(0.2)
        (folder / "saved").write_text(str(step))
    writer.status("finished" if step == writer.config.steps else "stopped", step, error=stop.requested())
"""

ENDLESS = 10**6


def make_config(steps: int = 5) -> TrainConfig:
    return TrainConfig(recipe="tiny", steps=steps, batch_size=1, mini_batch_size=1, refine=None)


@pytest.fixture
def trainer(tmp_path) -> Callable[..., list[str]]:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    return lambda mode="trains": [sys.executable, str(script), mode]


@pytest.fixture
def launched(tmp_path, trainer):
    """Starts runs; whatever still lives when the test ends is killed."""
    processes = []

    def launch_one(steps: int = 5, mode: str = "trains", detach: bool = False) -> RunProcess:
        process = start(make_config(steps), detach=detach, runs=tmp_path / "runs", command=trainer(mode))
        processes.append(process)
        return process

    yield launch_one
    for process in processes:
        if process.alive:
            process.popen.kill()
        wait_until(lambda process=process: not process.alive)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def wait_for_step(run: Run, step: int = 3) -> None:
    wait_until(lambda: run.status.step >= step)


def assert_saved_and_gone(run: Run, pid: int) -> None:
    """The run stopped by itself: its last step is in a checkpoint, its process no more."""
    wait_until(lambda: not run.alive)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    status = run.status
    assert status.state == "stopped"
    assert 0 < status.step < ENDLESS
    step, folder = run.latest_checkpoint()
    assert step == status.step == run.metrics()["step"].iloc[-1]
    assert (folder / "saved").read_text() == str(step)


def quiet(line: str) -> None:
    """A log that keeps nothing."""


# --- following a run to its end -------------------------------------------------------------------------------------


def test_follow_waits_and_tells_of_progress(launched):
    lines, updates = [], []
    process = launched(steps=30)
    assert process.alive
    assert process.run.alive, "the lock is held from the process's first instruction"
    run = follow(process, every=0.05, on_update=updates.append, log=lines.append)
    assert run.state == "finished"
    assert run.metrics()["step"].tolist() == list(range(1, 31))
    assert run.latest_checkpoint()[0] == 30
    assert process.returncode == 0
    assert not run.alive
    assert updates
    assert all(update.path == run.path for update in updates)
    assert "5,000 tokens/s, 1:01 left, ntp_loss " in "\n".join(lines)
    assert lines[-1].startswith("sft s0: finished, step 30/30")
    assert len(set(lines)) == len(lines), "a line is said once"


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fails", "failed at step 3 of 5: ValueError: the loss is nan"),
        ("crashes", "ended with exit status 1 at step 3 of 5: .*ZeroDivisionError: a step of nothing"),
    ],
)
def test_a_run_that_fails_fails_who_follows_with_its_last_error(launched, mode, message):
    with pytest.raises(RuntimeError, match=f"(?s)run .*-tiny-sft-s0 {message}"):
        follow(launched(mode=mode), every=0.05, log=quiet)


def test_a_command_that_does_not_start_python_is_reported(tmp_path):
    process = start(make_config(), detach=False, runs=tmp_path, command=[sys.executable, "-c", "import nothing_such"])
    with pytest.raises(RuntimeError, match=r"(?s)exit status 1 at step 0 of 5: .*No module named 'nothing_such'"):
        follow(process, log=quiet)


@pytest.mark.process
@pytest.mark.parametrize("detach", [False, True])
def test_a_run_that_is_killed_fails_who_follows(launched, detach):
    process = launched(ENDLESS, detach=detach)
    wait_for_step(process.run)
    process.popen.kill()
    with pytest.raises(
        RuntimeError, match=r"was killed by SIGKILL at step \d+ of 1000000: the process printed nothing"
    ):
        follow(process, log=quiet)
    assert process.run.state == "killed"
    with pytest.raises(RuntimeError, match="was killed at step"):
        follow(process.run, log=quiet)  # by one who did not start it


@pytest.mark.process
def test_an_error_of_on_update_stops_the_run(launched):
    process = launched(ENDLESS)
    wait_for_step(process.run)

    def draw(run: Run) -> None:
        raise LookupError("no figure")

    with pytest.raises(LookupError, match="no figure"):
        follow(process, on_update=draw, log=quiet)
    assert_saved_and_gone(process.run, process.popen.pid)


# --- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_stop_waits_until_the_run_has_saved(launched):
    process = launched(ENDLESS, detach=True)
    wait_for_step(process.run)
    assert stop(process.run).path == process.run.path
    assert_saved_and_gone(process.run, process.popen.pid)
    assert follow(process, log=quiet).status.error == "a stop was requested", "detached: stopped is no failure"


@pytest.mark.process
def test_a_run_that_was_stopped_is_not_whole_for_who_needs_it(launched):
    process = launched(ENDLESS)
    wait_for_step(process.run)
    process.popen.terminate()
    with pytest.raises(RuntimeError, match=r"was stopped at step \d+ of 1000000: stopped by SIGTERM"):
        follow(process, log=quiet)
    assert_saved_and_gone(process.run, process.popen.pid)


@pytest.mark.process
def test_stop_of_a_run_that_hangs_says_so(launched):
    process = launched(ENDLESS, mode="hangs")
    wait_for_step(process.run)
    with pytest.raises(TimeoutError, match=r"did not stop within 0\.3 s of being asked to"):
        stop(process, timeout=0.3)


@pytest.mark.process
def test_a_run_that_hangs_is_killed_when_waiting_is_interrupted(launched, monkeypatch):
    monkeypatch.setattr(runs_process, "SAVE_SECONDS", 0.3)
    process = launched(ENDLESS, mode="hangs")
    wait_for_step(process.run)

    def interrupt(run: Run) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(process, on_update=interrupt, log=quiet)
    wait_until(lambda: not process.run.alive)
    assert process.returncode == -signal.SIGKILL


# --- once more ------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_stopped_run_resumes_where_it_saved(launched, trainer):
    process = launched(steps=200)
    wait_for_step(process.run)
    with pytest.raises(RuntimeError, match=r"is in use by process \d+ on "):
        resume(process.run, detach=False, command=trainer())
    stop(process)
    saved = process.run.latest_checkpoint()[0]
    assert 3 <= saved < 200
    again = resume(process.run.path, detach=False, command=trainer())
    assert again.run.status.state in ("starting", "running"), "not that of the process before"
    run = follow(again, log=quiet)
    assert run.metrics()["step"].tolist() == list(range(1, 201))
    assert [step for step, _ in run.checkpoints()] == [saved, 200]


@pytest.mark.process
def test_attach_follows_a_detached_run(launched):
    process = launched(steps=50, detach=True)
    attached = attach(process.run.path)
    assert attached.alive
    assert attached.detached
    assert attached.returncode is None
    assert follow(attached, every=0.05, log=quiet).state == "finished"
    assert not attached.alive


@pytest.mark.process
def test_child_setup_by_hand_holds_the_lock_and_forgets_an_old_stop(tmp_path, trainer):
    with RunWriter.create(make_config(ENDLESS), tmp_path) as writer:
        run = writer.run
    (run.path / "stop").touch()
    command, environ = [*trainer(), str(run.path)], {**os.environ, **ENVIRON}
    process = subprocess.Popen(command, env=environ)
    wait_for_step(run)
    assert run.alive
    second = subprocess.run(command, env=environ, capture_output=True)
    assert second.returncode == 1
    assert b"is in use by process " in second.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert_saved_and_gone(run, process.pid)
    assert run.status.error == "stopped by SIGINT"


@pytest.mark.process
@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_ends_a_run_at_once(launched, numbers):
    process = launched(ENDLESS, mode="hangs")  # it would never save
    wait_for_step(process.run)
    os.kill(process.popen.pid, numbers[0])
    time.sleep(0.3)
    assert process.alive
    os.kill(process.popen.pid, numbers[1])
    wait_until(lambda: not process.alive, 5)
    assert process.returncode == -numbers[1]
    assert process.run.state == "killed"


def test_watch_parent_notices_the_end_of_the_pipe():
    read_end, write_end = os.pipe()
    gone = threading.Event()
    thread = watch_parent(read_end, gone.set)
    os.write(write_end, b"still here")
    assert not gone.wait(0.1)
    os.close(write_end)
    assert gone.wait(60)
    thread.join()
    os.close(read_end)


# --- when the one who started it ends -------------------------------------------------------------------------------

PARENT = """
import sys
from pathlib import Path
from refine_lab.config import TrainConfig
from refine_lab.runs.process import start, follow
runs, how, *command = sys.argv[1:]
config = TrainConfig(recipe="tiny", steps=10**6, batch_size=1, mini_batch_size=1, refine=None)
follow(start(config, detach=how == "detached", runs=Path(runs), command=command), every=0.1)
"""


@pytest.fixture
def parent(tmp_path, trainer):
    """Starts a process, head of its own group, that starts a run and follows it: (parent, run, the run's pid)."""
    made = []

    def make(command: list[str]) -> tuple[subprocess.Popen, Run, int]:
        process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRON, "REFINE_RUNS": str(tmp_path / "runs")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        made.append(process)
        wait_until(lambda: list((tmp_path / "runs").glob("*/status.json")))
        (run,) = list_runs(tmp_path / "runs")
        wait_for_step(run)
        return process, run, run.status.pid

    yield make
    for process in made:
        process.kill()
        process.communicate()
    for run in list_runs(tmp_path / "runs"):
        if run.alive:
            os.kill(run.status.pid, signal.SIGKILL)


@pytest.fixture
def script(tmp_path, trainer, parent):
    """`parent` with a plain script."""
    path = tmp_path / "parent.py"
    path.write_text(PARENT)
    return lambda how, mode="trains": parent([sys.executable, str(path), str(tmp_path / "runs"), how, *trainer(mode)])


@pytest.mark.process
def test_interrupt_stops_the_run_and_is_raised(script):
    process, run, pid = script("attached")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert not run.alive, "it waited for the run to save"
    assert b"KeyboardInterrupt" in output
    assert f"stopping run {run.name} after it has saved".encode() in output
    assert process.returncode == -signal.SIGINT
    assert_saved_and_gone(run, pid)


@pytest.mark.process
def test_sigterm_stops_the_run_and_then_the_one_who_waits(script):
    process, run, pid = script("attached")
    process.terminate()
    process.communicate(timeout=60)
    assert not run.alive, "it waited for the run to save"
    assert process.returncode == -signal.SIGTERM, "as if nobody had caught it"
    assert_saved_and_gone(run, pid)
    assert run.status.error == "a stop was requested"


@pytest.mark.process
@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["parent", "group"])
def test_kill_of_the_parent_stops_the_run_by_itself(script, kill):
    process, run, pid = script("attached")
    kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert_saved_and_gone(run, pid)
    assert run.status.error == "the process that started it has exited"
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run.path) in (p.info["cmdline"] or [])]


@pytest.mark.process
def test_a_run_that_hangs_does_not_outlive_its_parent_for_long(script):
    process, run, _ = script("attached", "hangs")
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not run.alive)
    assert run.state == "killed"
    assert "this run did not save within 5 s; killing it" in (run.path / "log.txt").read_text()


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_detached_run_outlives_who_started_it(script, number):
    process, run, pid = script("detached")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    wait_for_step(run, run.status.step + 3)
    assert run.alive
    assert psutil.pid_exists(pid)
    stop(run)
    assert_saved_and_gone(run, pid)


# --- papermill ------------------------------------------------------------------------------------------------------


def write_notebook(path: Path, command: list[str], steps: int) -> None:
    import nbformat

    source = PARENT.replace("sys.argv[1:]", repr(["", "attached", *command]))
    source = source.replace("runs=Path(runs), ", "").replace("10**6", str(steps))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip())])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


@pytest.fixture
def papermill(tmp_path, trainer):
    def command(mode: str, steps: int = ENDLESS) -> list[str]:
        write_notebook(tmp_path / "in.ipynb", trainer(mode), steps)
        paths = [str(tmp_path / name) for name in ("in.ipynb", "out.ipynb")]
        return [sys.executable, "-m", "papermill", "--log-output", "--no-progress-bar", *paths]

    return command


@pytest.mark.process
@pytest.mark.notebook
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_papermill_that_is_stopped_leaves_no_process(parent, papermill, number):
    process, run, pid = parent(papermill("trains"))
    (kernel,) = [child for child in psutil.Process(process.pid).children() if "ipykernel_launcher" in child.cmdline()]
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert_saved_and_gone(run, pid)
    wait_until(lambda: not kernel.is_running())


@pytest.mark.process
@pytest.mark.notebook
@pytest.mark.parametrize("mode", ["trains", "fails", "killed"])
def test_papermill_fails_where_its_run_does(parent, papermill, mode):
    if mode == "killed":
        process, _, pid = parent(papermill("trains"))
        os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert b"was killed by SIGKILL at step" in output
    else:
        process, run, _ = parent(papermill(mode, steps=300))
        output, _ = process.communicate(timeout=60)
        assert (process.returncode == 0) == (mode == "trains")
        assert (b"ValueError: the loss is nan" in output) == (mode == "fails")
        assert (b"step 300/300" in output) == (mode == "trains"), "papermill's log has the progress"
        assert run.status.state == {"trains": "finished", "fails": "failed"}[mode]


# --- quickness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["refine_lab", "refine_lab.config", "refine_lab.runs.queue", "refine_lab.training.__main__"]
)
def test_starting_a_run_needs_no_torch(module):
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    environ = {**os.environ, **ENVIRON}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
