"""Whole runs: killed and resumed, fed with nonsense, in other folders and terminals."""

import io
import itertools
import math
import multiprocessing
import os
import pathlib
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

import mappo
from cloud_env import CloudEnv, InputError
from dgpg import Args, evaluate, train
from tests.helpers import ROOT, SCRIPTS, only_run, scalars, write_trace

SMALL = dict(n_agents=3, rounds=10, num_steps=5, load=2.0, num_minibatches=2, update_epochs=2, minibatch_agents=2)
PROCESSES = multiprocessing.get_context("forkserver")  # children start with the packages imported
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "torch.utils.tensorboard", "tyro"])  # Adam wants _dynamo


def add_and_write(add_scalar, writer, *scalar):
    add_scalar(writer, *scalar)
    writer.flush()


STOPS = {  # where a run is killed: the function, what it does instead, and at which call
    "right after a checkpoint": (os, "replace", lambda replace, *paths: replace(*paths), 3),
    "in the middle of writing one": (os, "replace", lambda replace, new, _: os.truncate(new, 1000), 3),
    "with half of an update's events written": (SummaryWriter, "add_scalar", add_and_write, 30),
}


def kill_at(owner, name, instead, count):
    call, calls = getattr(owner, name), itertools.count(1)

    def stopped(*args):
        if next(calls) < count:
            return call(*args)
        instead(call, *args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, stopped)


def write_late(add_event=EventFileWriter.add_event, flush=EventFileWriter.flush):
    """Let events be written when the writer is flushed, the latest moment there is."""
    waiting = []

    def flush_all(writer):
        while waiting:
            add_event(writer, waiting.pop(0))
        flush(writer)

    EventFileWriter.add_event = lambda writer, event: waiting.append(event)
    EventFileWriter.flush = flush_all


def run_in(folder, script, options, stop):
    """`python script options` in `folder`, in this process."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    write_late()
    if stop:
        kill_at(*STOPS[stop])
    sys.argv = [script, *options]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def run(script, *options, stop=None):
    """Exit status of a whole run, or of one that is killed at a name in STOPS."""
    process = PROCESSES.Process(target=run_in, args=(os.getcwd(), script, options, stop))
    process.start()
    process.join()
    # TensorBoard reads event files in the order of their names, which begin with the second: a number in its place
    for number, path in enumerate(sorted(pathlib.Path().glob("runs/*/*tfevents*"))):
        path.rename(path.with_name(f"events.out.tfevents.{number:010d}"))
    return process.exitcode


def flags(**options):
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def logged(name="*"):
    """Every scalar of a run but wall times; an evaluation may be there twice, with the same value."""
    points = [(tag, *point) for tag, points in scalars(name).items() for point in points if tag != "charts/SPS"]
    evaluations = {point for point in points if point[0].startswith("eval/")}
    return sorted([*evaluations, *(point for point in points if point not in evaluations)])


def state(name="*"):
    """All that a run's checkpoint has but names."""
    checkpoint = torch.load(only_run(name) / "checkpoint.pt", weights_only=True)
    for option in ("resume", "exp_name"):
        del checkpoint["args"][option]
    return checkpoint


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def contents():
    return {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}


KILLS = {
    "dgpg.py": STOPS,
    "mappo.py": ["in the middle of writing one"],
    "ippo.py": ["right after a checkpoint"],
}


@pytest.mark.parametrize("script, kills", KILLS.items(), ids=KILLS)
def test_killed_at_any_moment_and_resumed_ends_as_if_never_killed(script, kills):
    """Of ten iterations of two episodes each, every second one with an evaluation."""
    options = flags(**SMALL, num_envs=2, episodes=20, eval_every=4, seed=5)
    assert run(script, *options, "--exp-name", "whole") == 0
    options += ["--exp-name", "killed"]
    for kind in kills:
        assert run(script, *options, stop=kind) == -signal.SIGKILL, kind
        options = flags(resume=only_run("killed"))
    assert run(script, *options) == 0
    assert same(state("killed"), state("whole"))
    assert logged("killed") == logged("whole")


def test_a_finished_run_resumes_to_its_last_line(capsys):
    result = train(Args(**SMALL, episodes=2))
    last, before = capsys.readouterr().out.splitlines()[-1].split(" seconds=")[0], logged()
    assert train(Args(resume=str(only_run()))) == result
    assert capsys.readouterr().out.splitlines()[-1].split(" seconds=")[0] == last
    assert logged() == before


class Wrong(CloudEnv):
    """Its rewards are not finite in the third episode of two environments."""

    def __init__(self, args, num_envs, held_out=False):
        super().__init__(num_envs, args.n_agents, args.rounds)

    def reset(self, seed):
        self.wrong = seed == 10**6 + 4
        return super().reset(seed)

    def step(self, actions):
        obs, reward, *rest = super().step(actions)
        return obs, reward - math.inf if self.wrong else reward, *rest


@dataclass
class More(Args):
    width: int = 3  # an option of another program's


def test_what_cannot_be_resumed_is_named_and_nothing_is_touched():
    train(Args(**SMALL, episodes=1))
    run = only_run()
    before, path = contents(), run / "checkpoint.pt"
    for refused, message in (
        (lambda: train(Args(resume=str(path))), "must be a folder of this dgpg.py"),
        (lambda: train(Args(resume=str(run), seed=2)), r"no other option given: \['seed'\]"),
        (lambda: train(More(resume=str(run))), "must be a folder of this dgpg.py"),
        (lambda: mappo.train(mappo.Args(resume=str(run))), "must be a folder of this mappo.py"),
        (lambda: train(Args(resume=str(run)), Wrong), "a run on CloudEnv, not on Wrong"),
        (lambda: train(Args(**SMALL, init_actor=str(run)), Wrong), "a run on CloudEnv, not on Wrong"),
    ):
        with pytest.raises(InputError, match=message):
            refused()
    assert contents() == before
    for size in (0, len(before[path]) // 2, len(before[path]) - 1):
        path.write_bytes(before[path][:size])
        with pytest.raises(InputError, match="checkpoint.pt is no checkpoint") as error:
            train(Args(resume=str(run)))
        assert len(str(error.value).splitlines()) == 1


class Foreign:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_pickle_is_not_executed():
    train(Args(**SMALL, episodes=1))
    torch.save({"actor": Foreign(), "args": {}, "script": "dgpg.py", "system": "CloudEnv"}, "foreign.pt")
    pathlib.Path("plain.pt").write_bytes(pickle.dumps(Foreign()))
    shutil.copy("foreign.pt", only_run() / "checkpoint.pt")
    for options in (dict(resume=str(only_run())), dict(init_actor="foreign.pt"), dict(init_actor="plain.pt")):
        with pytest.raises(InputError, match="is no checkpoint"):
            train(Args(**options))
    assert not os.path.exists("executed")


@SCRIPTS
def test_numbers_that_go_wrong_stop_the_run(script):
    with pytest.raises(RuntimeError, match="non-finite"):
        script.train(script.Args(**SMALL, episodes=20, num_envs=2, eval_every=99), Wrong)
    assert state()["episode"] == 4
    assert all(weight.isfinite().all() for weight in state()["actor"].values())


WRONG = {
    "--n-agents 0": "n_agents",
    "--load nan": "load",
    "--load 1e12": "load",
    "--alpha-end -0.1": "alpha_end",
    "--alpha-start nan": "alpha_start",
    "--gamma 1.1": "gamma",
    "--num-minibatches 0": "num_minibatches",
    "--num-steps 0": "num_steps",
    "--eval-every 0": "eval_every",
    "--episodes 5 --num-envs 2": "episodes",
    "--seed 100000": "seed",
    "--learning-rate inf": "learning_rate",
    "--trace missing.csv": "missing.csv",
    "--trace short.csv": "short.csv",
    "--resume missing": "missing is no checkpoint",
    "--resume=": "is no checkpoint",  # of a shell variable that is not set
    "--init-actor missing.pt": "missing.pt",
    "--exp-name taken.csv/name": "taken.csv",
}


def main(monkeypatch, *options):
    """`python dgpg.py options` in this process: what it passes to sys.exit."""
    monkeypatch.setattr(sys, "argv", ["dgpg.py", *options])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "dgpg.py"), run_name="__main__")
    return exit.value.code


@pytest.mark.parametrize("options, named", WRONG.items(), ids=WRONG)
def test_bad_input_is_one_line_that_names_it_and_nothing_is_written(monkeypatch, options, named):
    write_trace("short.csv", [(0, 1, 1, 1), (1, 1, 1, 1)])
    pathlib.Path("runs").mkdir()
    pathlib.Path("runs/taken.csv").write_text("a file where a folder would be")
    before = contents()
    message = main(monkeypatch, *options.split())  # Python prints it on stderr and ends with status 1
    assert isinstance(message, str) and named in message and len(message.splitlines()) == 1
    assert contents() == before


def test_help_needs_no_unicode(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert main(monkeypatch, "--help") == 0
    sys.stdout.flush()
    assert b"--n-agents" in written.getvalue()


def test_three_files_copied_elsewhere_run_by_themselves():
    """With blanks in the name and a trace by a relative path; the finished run resumes to its last line."""
    for name in ("dgpg.py", "cloud_env.py", "analytic_model.py"):
        shutil.copy(ROOT / name, name)
    write_trace("trace.csv", [(i, 1 + i % 5, 1 + i % 3, 2) for i in range(200)])
    options = flags(n_agents=3, rounds=10, episodes=1, exp_name="two words", trace="trace.csv")
    last = []
    for words in (options, flags(resume="runs/two words")):
        call = dict(capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
        done = subprocess.run([sys.executable, "dgpg.py", *words], **call)
        assert (done.returncode, done.stderr) == (0, "")
        last.append(done.stdout.splitlines()[-1].split(" seconds=")[0])
        if words is options:
            only_run().rename("runs/two words")
    assert last[0] == last[1] and last[0].startswith("episodes=1 heuristic=")


def test_a_heuristic_without_cost_is_said_to(capsys):
    result = train(Args(n_agents=5, rounds=10, load=1e-3, episodes=1))
    assert math.isnan(result["cost_ratio"]) and result["heuristic"] == 0
    assert "cost_ratio means nothing" in capsys.readouterr().out


def test_trains_on_a_trace_and_evaluates_on_its_last_part():
    """Of simultaneous arrivals, a third of them without duration."""
    write_trace("trace.csv", [(i // 9 * 9, [0, 50, 5][i % 3], 1 + i % 4, 2) for i in range(300)])
    result = train(Args(**SMALL, episodes=1, trace="trace.csv"))
    env = CloudEnv(40, 3, 10, 2.0, trace="trace.csv", held_out=True)
    assert result["heuristic"] == evaluate(env, lambda obs: env.heuristic()) > result["random"]
    assert math.isfinite(result["return"])
