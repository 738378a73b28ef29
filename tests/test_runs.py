"""Whole runs: killed and resumed, fed with nonsense, in other folders and terminals."""

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
from dataclasses import make_dataclass

import numpy as np
import pytest
import torch
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter

import ippo
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
    points = {tag: points for tag, points in scalars(name).items() if tag != "charts/SPS"}
    return points | {tag: sorted(set(points[tag])) for tag in points if tag.startswith("eval/")}


def state(name="*"):
    """All that a run's checkpoint has but names, with lists for tensors."""
    checkpoint = torch.load(only_run(name) / "checkpoint.pt", weights_only=True)
    for option in ("resume", "exp_name"):
        del checkpoint["args"][option]
    return tree_map(lambda value: value.tolist() if isinstance(value, torch.Tensor) else value, checkpoint)


def contents():
    return {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", ["dgpg.py", "mappo.py", "ippo.py"])
def test_killed_at_any_moment_and_resumed_ends_as_if_never_killed(script):
    """Of ten iterations of two episodes each, every second one with an evaluation."""
    options = flags(**SMALL, num_envs=2, episodes=20, eval_every=4, seed=5)
    assert run(script, *options, "--exp-name", "whole") == 0
    options += ["--exp-name", "killed"]
    for kind in STOPS:
        assert run(script, *options, stop=kind) == -signal.SIGKILL, kind
        options = flags(resume=only_run("killed"))
    for _ in range(2):  # a run that has ended can be resumed, too
        assert run(script, *options) == 0
        assert state("killed") == state("whole")
        assert logged("killed") == logged("whole")


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


class Foreign:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_what_cannot_be_resumed_is_named_and_nothing_is_touched_nor_executed():
    train(Args(**SMALL, episodes=1))
    mappo.train(mappo.Args(**SMALL, episodes=1, num_envs=1))  # has the same options as ippo.py
    run, of_mappo = only_run("dgpg"), only_run("mappo")
    path = run / "checkpoint.pt"
    more_options = make_dataclass("More", [("width", int, 3)], bases=(Args,))
    torch.save({"actor": Foreign(), "args": {}, "script": "dgpg.py", "system": "CloudEnv"}, "foreign.pt")
    pathlib.Path("plain.pt").write_bytes(pickle.dumps(Foreign()))
    before = contents()
    for refused, message in (
        (lambda: train(Args(resume=str(path))), "must be the folder of a run of dgpg.py"),
        (lambda: train(Args(resume=str(run), seed=2)), r"without \['seed'\]"),
        (lambda: train(more_options(resume=str(run))), "must be the folder of a run of dgpg.py"),
        (lambda: ippo.train(ippo.Args(resume=str(of_mappo))), "must be the folder of a run of ippo.py"),
        (lambda: train(Args(resume=str(run)), Wrong), "a run on CloudEnv, not on Wrong"),
        (lambda: train(Args(**SMALL, init_actor=str(run)), Wrong), "a run on CloudEnv, not on Wrong"),
        (lambda: train(Args(resume="foreign.pt")), "foreign.pt is no checkpoint"),
        (lambda: train(Args(init_actor="foreign.pt")), "foreign.pt is no checkpoint"),
        (lambda: train(Args(init_actor="plain.pt")), "plain.pt is no checkpoint"),
    ):
        with pytest.raises(InputError, match=message) as error:
            refused()
        assert len(str(error.value).splitlines()) == 1
    assert contents() == before and not os.path.exists("executed")
    for size in (0, len(before[path]) // 2, len(before[path]) - 1):
        path.write_bytes(before[path][:size])
        with pytest.raises(InputError, match="checkpoint.pt is no checkpoint"):
            train(Args(resume=str(run)))


@SCRIPTS
def test_numbers_that_go_wrong_stop_the_run(script):
    with pytest.raises(RuntimeError, match="non-finite"):
        script.train(script.Args(**SMALL, episodes=20, num_envs=2, eval_every=99), Wrong)
    assert state()["episode"] == 4
    assert all(np.isfinite(weight).all() for weight in state()["actor"].values())


OUT_OF_RANGE = """n_agents=0 load=nan load=1e12 alpha_end=-0.1 alpha_start=nan gamma=1.1 num_minibatches=0 num_steps=0
    eval_every=0 seed=100000 learning_rate=inf""".split()
WRONG = {f"--{option}": option.split("=")[0] for option in OUT_OF_RANGE} | {
    "--episodes 5 --num-envs 2": "episodes",
    "--trace missing.csv": "missing.csv",
    "--trace short.csv": "short.csv",
    "--resume missing": "missing is no checkpoint",
    "--resume=": "is no checkpoint",  # of a shell variable that is not set
    "--init-actor missing.pt": "missing.pt",
    "--exp-name taken.csv/name": "taken.csv",
}


@pytest.mark.parametrize("options, named", WRONG.items(), ids=WRONG)
def test_bad_input_is_one_line_that_names_it_and_nothing_is_written(monkeypatch, options, named):
    write_trace("short.csv", [(0, 1, 1, 1), (1, 1, 1, 1)])
    pathlib.Path("runs").mkdir()
    pathlib.Path("runs/taken.csv").write_text("a file where a folder would be")
    before = contents()
    monkeypatch.setattr(sys, "argv", ["dgpg.py", *options.split()])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "dgpg.py"), run_name="__main__")
    message = exit.value.code  # Python prints it on stderr and ends with status 1
    assert isinstance(message, str) and named in message and len(message.splitlines()) == 1
    assert contents() == before


def test_three_files_copied_elsewhere_run_by_themselves():
    """Also in a terminal without Unicode. With blanks in the name and a trace by a relative path, evaluated on its last
    part. The finished run resumes to its last line."""
    for name in ("dgpg.py", "cloud_env.py", "analytic_model.py"):
        shutil.copy(ROOT / name, name)
    # simultaneous arrivals, a third of them without duration
    write_trace("trace.csv", [(i // 9 * 9, [0, 50, 5][i % 3], 1 + i % 4, 2) for i in range(300)])
    options = flags(n_agents=3, rounds=10, load=2.0, episodes=1, exp_name="two words", trace="trace.csv")
    environment, said = {**os.environ, "PYTHONPATH": "", "PYTHONIOENCODING": "ascii"}, []
    for words in (["--help"], options, flags(resume="runs/two words")):
        call = [sys.executable, "dgpg.py", *words]
        done = subprocess.run(call, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout)
        if words is options:
            only_run().rename("runs/two words")
    env = CloudEnv(40, 3, 10, 2.0, trace="trace.csv", held_out=True)
    heuristic = evaluate(env, lambda obs: env.heuristic())
    last, resumed = (text.splitlines()[-1].split(" seconds=")[0] for text in said[1:])
    assert last == resumed and last.startswith(f"episodes=1 heuristic={heuristic:.3f} random=")
    assert "--n-agents" in said[0]


def test_a_heuristic_without_cost_has_no_cost_ratio():
    result = train(Args(n_agents=5, rounds=10, load=1e-3, episodes=1))
    assert math.isnan(result["cost_ratio"]) and result["heuristic"] == 0
