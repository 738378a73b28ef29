"""Whole runs: interrupted and resumed, fed with nonsense, in other programs and terminals."""

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
import threading

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

import cloud_env
import dgpg
import ippo
import mappo
from cloud_env import InputError, load_trace
from dgpg import Args, train

ROOT = pathlib.Path(dgpg.__file__).parent
SMALL = dict(n_agents=3, rounds=10, num_steps=5, load=2.0, num_minibatches=2, update_epochs=2, minibatch_agents=2)
PROCESSES = multiprocessing.get_context("forkserver")  # children start with the packages imported
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "torch.utils.tensorboard", "tyro"])  # Adam wants _dynamo


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_when_saved(replace, new, target):
    replace(new, target)
    kill()


def kill_while_saving(replace, new, target):
    os.truncate(new, os.path.getsize(new) // 2)
    kill()


def kill_between_events(add_scalar, writer, *scalar):
    add_scalar(writer, *scalar)
    writer.flush()
    kill()


STOPS = {
    "right after a checkpoint": (os, "replace", kill_when_saved),
    "in the middle of writing one": (os, "replace", kill_while_saving),
    "in a rollout": (cloud_env.CloudEnv, "step", kill),
    "with half of an update's events written": (SummaryWriter, "add_scalar", kill_between_events),
}


def run_in(folder, script, *options, stop=None):
    """`python script options` in `folder`, in this process; what it prints goes to the file out there."""
    os.chdir(folder)
    os.dup2(os.open("out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stdout.fileno())
    if stop:
        what, count = stop
        owner, name, do = STOPS[what]
        call, calls = getattr(owner, name), itertools.count(1)
        setattr(owner, name, lambda *args: do(call, *args) if next(calls) == count else call(*args))
    sys.argv = [script, *options]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def run(folder, script, *options, stop=None):
    """Exit status of a whole run, or of one that is killed: at a name in STOPS, and the call's number."""
    folder.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=run_in, args=(folder, script, *options), kwargs=dict(stop=stop))
    process.start()
    process.join()
    # TensorBoard reads event files in the order of their names, which begin with the second: a number in its place
    for number, path in enumerate(sorted(folder.glob("runs/*/*tfevents*"))):
        path.rename(path.with_name(f"events.out.tfevents.{number:010d}"))
    return process.exitcode


def flags(**options):
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def logged(folder):
    """Every scalar of the only run in `folder` but wall times; an evaluation may be there twice, with the same value."""
    events = EventAccumulator(str(only_run(folder))).Reload()
    points = [(tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    evaluations = {point for point in points if point[0].startswith("eval/")}
    others = [point for point in points if point not in evaluations and point[0] != "charts/SPS"]
    return sorted([*evaluations, *others])


def state(folder):
    checkpoint = torch.load(only_run(folder) / "checkpoint.pt", weights_only=True)
    checkpoint["args"].pop("resume")
    return checkpoint


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ten iterations of two episodes each, every second one with an evaluation
WHOLE = flags(**SMALL, num_envs=2, episodes=20, eval_every=4, seed=5)
KILLS = {
    "dgpg.py": [
        ("right after a checkpoint", 3),
        ("in the middle of writing one", 2),
        ("in a rollout", 65),
        ("with half of an update's events written", 30),
    ],
    "mappo.py": [("in the middle of writing one", 4)],
    "ippo.py": [("with half of an update's events written", 40)],
}


@pytest.mark.parametrize("script, kills", KILLS.items(), ids=KILLS)
def test_killed_at_any_moment_and_resumed_ends_as_if_never_killed(tmp_path, script, kills):
    whole, killed, options = tmp_path / "whole", tmp_path / "killed", WHOLE
    assert run(whole, script, *WHOLE) == 0
    for stop in kills:
        assert run(killed, script, *options, stop=stop) == -signal.SIGKILL, stop
        options = flags(resume=only_run(killed))
    assert run(killed, script, *options) == 0
    assert same(state(killed), state(whole))
    assert logged(killed) == logged(whole)


def test_nothing_that_a_checkpoint_goes_on_from_is_still_unwritten(tmp_path, monkeypatch):
    """When the checkpoint after e episodes appears, all events up to e are in the file; a run that goes on from it ends
    with the same weights and figures."""
    on_disk, checkpoints, waiting = [], [], []

    def flush(writer, add_event=EventFileWriter.add_event, flush=EventFileWriter.flush):
        while waiting:
            add_event(writer, waiting.pop(0))
        flush(writer)

    # the latest that an event may be written is when the writer is flushed
    monkeypatch.setattr(EventFileWriter, "add_event", lambda writer, event: waiting.append(event))
    monkeypatch.setattr(EventFileWriter, "flush", flush)

    def keep(source, target, replace=os.replace):
        checkpoints.append(pathlib.Path(source).read_bytes())
        on_disk.append(logged(tmp_path))
        replace(source, target)

    monkeypatch.setattr(os, "replace", keep)
    result = train(Args(**SMALL, episodes=4, eval_every=2))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    path, end, log = only_run(tmp_path) / "checkpoint.pt", state(tmp_path), logged(tmp_path)
    for episode, there in enumerate(on_disk, 1):
        evaluated = [point for point in log if point[0].startswith("eval/")]
        assert there == [point for point in log if point[1] <= episode - (point in evaluated)]
    for checkpoint in checkpoints:
        path.write_bytes(checkpoint)
        assert train(Args(resume=str(path.parent))) == result
        assert same(state(tmp_path), end) and logged(tmp_path) == log


def test_a_finished_run_resumes_to_its_last_line(tmp_path, capsys):
    result = train(Args(**SMALL, episodes=2))
    last, before = capsys.readouterr().out.splitlines()[-1].split(" seconds=")[0], logged(tmp_path)
    assert train(Args(resume=str(only_run(tmp_path)))) == result
    assert capsys.readouterr().out.splitlines()[-1].split(" seconds=")[0] == last
    assert logged(tmp_path) == before


def test_a_trace_that_has_changed_gives_a_ratio_of_the_new_one(tmp_path):
    """Policy and Best-Fit are always measured on the same scenarios."""
    for length in (5, 50):
        text = "\n".join(
            ["arrival_s,duration_s,cpu,memory_gib", *(f"{i},{1 + i % length},{1 + i % 3},2" for i in range(300))]
        )
        pathlib.Path("trace.csv").write_text(text)
        if length == 5:
            first = train(Args(**SMALL, episodes=2, trace="trace.csv"))
    again = train(Args(resume=str(only_run(tmp_path))))
    assert again["heuristic"] != first["heuristic"]
    assert again["cost_ratio"] == again["return"] / again["heuristic"]


class Other(cloud_env.CloudEnv):
    """Another system with the same shapes."""


def other(args, num_envs, held_out=False):
    return Other(num_envs, args.n_agents, args.rounds)


def test_what_cannot_be_resumed_is_named_and_nothing_is_touched(tmp_path):
    train(Args(**SMALL, episodes=1))
    run = only_run(tmp_path)
    mappo.train(mappo.Args(**SMALL, episodes=1, num_envs=1, exp_name="mappo"))
    (others,) = (tmp_path / "runs").glob("mappo*")
    before = contents(tmp_path)
    for refused, message in (
        (lambda: train(Args(resume="missing")), "missing is no checkpoint"),
        (lambda: train(Args(resume="")), "is no checkpoint"),  # of a shell variable that is not set
        (lambda: train(Args(resume=f"{run}/checkpoint.pt")), "must be a folder of dgpg.py"),
        (lambda: train(Args(resume=str(run), seed=2)), r"no other option given: \['seed'\]"),
        (lambda: mappo.train(mappo.Args(resume=str(run))), "must be a folder of mappo.py"),
        (lambda: train(Args(resume=str(others))), "must be a folder of dgpg.py"),
        (lambda: train(Args(resume=str(run)), other), "a run on CloudEnv, not on Other"),
        (lambda: train(Args(**SMALL, init_actor=str(run)), other), "a run on CloudEnv, not on Other"),
    ):
        with pytest.raises(InputError, match=message):
            refused()
    assert contents(tmp_path) == before
    path = run / "checkpoint.pt"
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="checkpoint.pt is no checkpoint") as error:
            train(Args(resume=str(run)))
        assert len(str(error.value).splitlines()) == 1
    path.write_bytes(whole)
    assert contents(tmp_path) == before


class Foreign:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_pickle_is_not_executed(tmp_path):
    train(Args(**SMALL, episodes=1))
    run = only_run(tmp_path)
    torch.save({"actor": Foreign(), "args": {}, "script": "dgpg.py", "system": "CloudEnv"}, "foreign.pt")
    pathlib.Path("plain.pt").write_bytes(pickle.dumps(Foreign()))
    (run / "checkpoint.pt").write_bytes(pathlib.Path("foreign.pt").read_bytes())
    with pytest.raises(InputError, match="checkpoint.pt"):
        train(Args(resume=str(run)))
    for name in ("foreign.pt", "plain.pt"):
        with pytest.raises(InputError, match=name):
            train(Args(**SMALL, init_actor=name))
    assert not os.path.exists("executed")


@pytest.mark.parametrize("script", [dgpg, mappo, ippo])
def test_numbers_that_go_wrong_stop_the_run(tmp_path, script):
    """A reward that is not finite, in the third episode: the last checkpoint is the second's."""
    episodes = itertools.count(-1)  # the first reset is for the sizes

    class Wrong(cloud_env.CloudEnv):
        def reset(self, seed):
            self.wrong = self.num_envs == 2 and next(episodes) == 2
            return super().reset(seed)

        def step(self, actions):
            obs, reward, *rest = super().step(actions)
            return obs, reward - math.inf if self.wrong else reward, *rest

    with pytest.raises(RuntimeError, match="non-finite"):
        script.train(
            script.Args(**SMALL, episodes=20, num_envs=2, eval_every=99),
            lambda args, num_envs, held_out=False: Wrong(num_envs, 3, 10),
        )
    checkpoint = state(tmp_path)
    assert checkpoint["episode"] == 4
    assert all(weight.isfinite().all() for weight in checkpoint["actor"].values())


WRONG = {
    "--servers-per-agent 0": "servers_per_agent",
    "--n-agents 0": "n_agents",
    "--alpha-end -0.1": "alpha_end",
    "--alpha-start nan": "alpha_start",
    "--gamma 1.1": "gamma",
    "--load 0": "load",
    "--load nan": "load",
    "--rounds 0": "rounds",
    "--num-envs 0": "num_envs",
    "--num-minibatches 0": "num_minibatches",
    "--num-steps 0": "num_steps",
    "--episodes -1": "episodes",
    "--episodes 5 --num-envs 2": "episodes",
    "--seed -1": "seed",
    "--seed 100000": "seed",
    "--learning-rate -1": "learning_rate",
    "--learning-rate inf": "learning_rate",
    "--eval-every 0": "eval_every",
    "--trace missing.csv": "missing.csv",
    "--trace empty.csv": "empty.csv: line 0",
    "--trace short.csv": "short.csv",
    "--trace comma.csv": "comma.csv: line 2",
    "--resume missing": "missing",
    "--init-actor missing.pt": "missing.pt",
    "--init-actor=": "no checkpoint",
    "--init-actor short.csv": "short.csv",
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
    header = "arrival_s,duration_s,cpu,memory_gib\n"
    files = {"empty.csv": "", "short.csv": header + "0,1,1,1\n1,1,1,1\n", "comma.csv": header + "0,60,0,5,2\n"}
    for name, text in files.items():
        pathlib.Path(name).write_text(text)
    pathlib.Path("runs").mkdir()
    pathlib.Path("runs/taken.csv").write_text("a file where a folder would be")
    before = contents(pathlib.Path())
    message = main(monkeypatch, *options.split())  # Python prints it on stderr and ends with status 1
    assert isinstance(message, str) and named in message and len(message.splitlines()) == 1
    assert contents(pathlib.Path()) == before


@pytest.mark.parametrize("options", ["--n-agents 1.5", "--load much", "--rounds", "--no-such-option 3", "stray"])
def test_what_the_option_parser_finds_it_says_itself(monkeypatch, capsys, options):
    assert main(monkeypatch, *options.split()) == 2 and options.split()[0] in capsys.readouterr().err
    assert not os.listdir()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_help_and_output_need_no_unicode(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for options, found in (("--help", "--n-agents"), ("--n-agents 2 --episodes 0 --rounds 5", "cost_ratio")):
        command = [sys.executable, str(ROOT / "dgpg.py"), *options.split()]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert (done.returncode, done.stderr) == (0, b"") and found in done.stdout.decode(encoding)


def test_a_users_mistake_from_outside():
    command = [sys.executable, str(ROOT / "dgpg.py"), "--alpha-end", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "alpha_end must be from 0 to 1, not 2.0\n")
    assert not os.listdir()


def test_the_checks_of_options_hold_under_postponed_annotations():
    for name in ("cloud_env.py", "analytic_model.py"):
        shutil.copy(ROOT / name, name)
    text = (ROOT / "dgpg.py").read_text()
    docstring = text.index('"""', 3) + 3
    pathlib.Path("dgpg.py").write_text(text[:docstring] + "\n\nfrom __future__ import annotations\n" + text[docstring:])
    for options, status, words in (("--alpha-end 2", 1, "alpha_end must be"), ("--n-agents 2 --episodes 1", 0, "")):
        command = [sys.executable, "dgpg.py", *options.split()]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
        assert done.returncode == status and words in done.stderr, done.stderr


def test_train_leaves_its_callers_process_as_it_was():
    """Threads, distributions' argument checks; and a failed run leaves no writer behind."""
    threads, writers = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(2)
    try:
        train(Args(**SMALL, episodes=1))
        with pytest.raises(RuntimeError, match="non-finite"):
            train(Args(**SMALL, episodes=2, learning_rate=99_999, max_grad_norm=99_999))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError):
        torch.distributions.Categorical(probs=torch.tensor([-1.0, 2.0]))
    assert threading.active_count() == writers


def test_a_bad_trace_in_a_worker_is_an_exception_of_its_caller():
    pathlib.Path("t.csv").write_text("arrival_s\n0\n")
    with PROCESSES.Pool(1) as pool:
        for name, error in (("missing.csv", FileNotFoundError), ("t.csv", InputError)):
            with pytest.raises(error, match=name):
                pool.map(load_trace, [name])


def test_a_heuristic_without_cost_is_said_to(capsys):
    result = train(Args(n_agents=5, rounds=10, load=1e-3, episodes=1))
    out = capsys.readouterr().out
    assert math.isnan(result["cost_ratio"]) and result["heuristic"] == 0
    assert "cost_ratio means nothing" in out
    train(Args(n_agents=5, rounds=30, episodes=0))
    assert "means nothing" not in capsys.readouterr().out


ONE = dict.fromkeys(("n_agents", "servers_per_agent", "rounds", "num_steps", "num_minibatches"), 1)
EDGES = {
    "one of everything": ONE | dict(minibatch_agents=1, num_envs=2),
    "one agent, and more in reach and in a minibatch": dict(n_agents=1, servers_per_agent=99, minibatch_agents=10**9),
    "one server in reach": dict(servers_per_agent=1),
    "more minibatches than states, of one agent": dict(num_minibatches=9, minibatch_agents=1),
    "no learning, evaluated never but at the ends": dict(learning_rate=0, gamma=0, gae_lambda=0, eval_every=10**9),
    "no clipping, no gradient": dict(clip_coef=0, max_grad_norm=0),
    "hardly any load": dict(load=1e-6),
    "far too much load, no discount": dict(load=1000, gamma=1, gae_lambda=1),
    "the largest seed": dict(seed=99_999),
}


@pytest.mark.parametrize("script", [dgpg, mappo, ippo])
@pytest.mark.parametrize("options", EDGES.values(), ids=EDGES)
def test_options_at_their_edges_train(script, options):
    result = script.train(script.Args(**{**SMALL, "num_envs": 1, "episodes": 2, **options}))
    assert math.isfinite(result["return"]) and result["return"] <= 0


HEADER = "arrival_s,duration_s,cpu,memory_gib"
TRACES = {
    "CRLF, a byte order mark and more columns": "\r\n".join(
        [f"\ufeffid, {HEADER},zone", *(f"{i},{i},5,1,2,b" for i in range(300))]
    ),
    "simultaneous arrivals": "\n".join([HEADER, *(f"{i // 100},5,1,2" for i in range(300))]),
    "durations of 0 and 1e9": "\n".join([HEADER, *(f"{i},{[0, 1e9, 5][i % 3]},1,2" for i in range(300))]),
}


@pytest.mark.parametrize("text", TRACES.values(), ids=TRACES)
def test_traces_at_their_edges_train(text):
    pathlib.Path("trace.csv").write_bytes(text.encode())
    assert math.isfinite(train(Args(**SMALL, episodes=1, trace="trace.csv"))["return"])


def test_three_files_copied_elsewhere_run_by_themselves():
    for name in ("dgpg.py", "cloud_env.py", "analytic_model.py"):
        shutil.copy(ROOT / name, name)
    command = [sys.executable, "dgpg.py", "--n-agents", "2", "--episodes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("episodes=1 heuristic=")
    assert done.stderr == ""
