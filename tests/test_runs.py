"""Runs that are interrupted, damaged, fed with nonsense or left without disk space: nothing lost, nothing silent."""

import itertools
import math
import multiprocessing
import os
import pathlib
import pickle
import resource
import runpy
import shutil
import signal
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

import cloud_env
import dgpg
import ippo
import mappo
from cloud_env import InputError
from dgpg import Args, train

SMALL = dict(n_agents=3, rounds=10, num_steps=5, load=2.0, num_minibatches=2, update_epochs=2, minibatch_agents=2)
PROCESSES = multiprocessing.get_context("forkserver")  # children start with the packages imported
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "torch.utils.tensorboard", "tyro"])  # Adam wants _dynamo


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_when_saved(replace, new, target):
    replace(new, target)
    kill()


def kill_while_saving(replace, new, target):
    os.truncate(new, os.path.getsize(new) // 2)
    kill()


def kill_in_rollout(step, env, actions):
    kill()


def kill_between_events(add_scalar, writer, *scalar):
    add_scalar(writer, *scalar)
    writer.flush()
    kill()


def interrupt(step, env, actions):
    os.kill(os.getpid(), signal.SIGINT)
    return step(env, actions)


def no_room_for_checkpoints(replace, new, target):
    replace(new, target)
    limit_file_size(os.path.getsize(target) // 2)


def no_room_for_events(add_scalar, writer, *scalar):
    writer.add_text("filler", "x" * 10**6)  # a checkpoint still fits in when the event file is full
    writer.flush()
    limit_file_size(100 + max(path.stat().st_size for path in pathlib.Path(writer.log_dir).glob("*tfevents*")))
    add_scalar(writer, *scalar)


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# what stops a run: owner, name, and what a call of owner.name does instead; it happens at a call, not at a time
STOPS = {
    "killed right after a checkpoint": (os, "replace", kill_when_saved),
    "killed in the middle of writing one": (os, "replace", kill_while_saving),
    "killed in a rollout": (cloud_env.CloudEnv, "step", kill_in_rollout),
    "killed with half of an update's events written": (SummaryWriter, "add_scalar", kill_between_events),
    "Ctrl-C in a rollout": (cloud_env.CloudEnv, "step", interrupt),
    "no room for the next checkpoint": (os, "replace", no_room_for_checkpoints),
    "no room for the next events": (SummaryWriter, "add_scalar", no_room_for_events),
}


def run_in(folder, script, *options, stop=None):
    """`python script options` in `folder`, in this process; what it prints goes to the files out and err there."""
    os.chdir(folder)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: a job in the background ignores it
    if stop:
        what, count = stop
        owner, name, do = STOPS[what]
        call, calls = getattr(owner, name), itertools.count(1)
        setattr(owner, name, lambda *args: do(call, *args) if next(calls) == count else call(*args))
    sys.argv = [script, *options]
    runpy.run_path(str(pathlib.Path(dgpg.__file__).parent / script), run_name="__main__")


def run(folder, script, *options, stop=None):
    """Exit status and lines on stderr of a whole run, or of one up to a stop: a name in STOPS and the call's number."""
    folder.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=run_in, args=(folder, script, *options), kwargs=dict(stop=stop))
    process.start()
    process.join()
    number_events(folder)
    return process.exitcode, (folder / "err").read_text().splitlines()


def flags(**options):
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def number_events(folder):
    """TensorBoard reads event files in the order of their names, which begin with the second: a number in its place."""
    files = sorted(folder.glob("runs/*/*tfevents*"))  # the last one is still called by the second
    for number, path in enumerate(files):
        path.rename(path.with_name(f"events.out.tfevents.{number:010d}"))


def logged(folder):
    """Every scalar of the only run in `folder` but wall times, as TensorBoard shows it."""
    events = EventAccumulator(str(only_run(folder))).Reload()
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def state(folder):
    """The last checkpoint's contents but wall times."""
    checkpoint = torch.load(only_run(folder) / "checkpoint.pt", weights_only=True)
    del checkpoint["train_seconds"], checkpoint["seconds"]
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


# ten updates of two episodes each, every second one with an evaluation
WHOLE = flags(**SMALL, num_envs=2, episodes=20, eval_every=4, seed=5)
KILLS = {
    "dgpg.py": [
        ("killed right after a checkpoint", 3),
        ("killed in the middle of writing one", 2),
        ("killed in a rollout", 15),
        ("killed with half of an update's events written", 30),
    ],
    "mappo.py": [("killed in the middle of writing one", 4)],
    "ippo.py": [("killed with half of an update's events written", 40)],
}


@pytest.mark.parametrize("script, kills", KILLS.items(), ids=KILLS)
def test_killed_at_any_moment_and_resumed_ends_as_if_never_killed(tmp_path, script, kills):
    whole, killed, options = tmp_path / "whole", tmp_path / "killed", WHOLE
    assert run(whole, script, *WHOLE) == (0, [])
    for kill in kills:
        assert run(killed, script, *options, stop=kill) == (-signal.SIGKILL, []), kill
        options = flags(resume=only_run(killed))
    assert run(killed, script, *options) == (0, [])
    assert same(state(killed), state(whole))
    assert logged(killed) == logged(whole)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    """A limit on a file's size stands in for the disk: the next checkpoint does not fit, or the event file."""
    whole, stopped, options = tmp_path / "whole", tmp_path / "stopped", WHOLE
    assert run(whole, "dgpg.py", *WHOLE) == (0, [])
    for what, call, episode in (("no room for the next checkpoint", 3, 4), ("no room for the next events", 35, 8)):
        status, lines = run(stopped, "dgpg.py", *options, stop=(what, call))
        assert status == 1 and any("Error" in line for line in lines), (what, lines)  # of two threads, in any order
        assert state(stopped)["episode"] == episode
        options = flags(resume=only_run(stopped))
    assert run(stopped, "dgpg.py", *options) == (0, [])
    assert same(state(stopped), state(whole))
    assert logged(stopped) == logged(whole)


def test_ctrl_c_leaves_a_checkpoint_and_the_run_said_how_to_go_on(tmp_path):
    status, lines = run(tmp_path, "dgpg.py", *WHOLE, stop=("Ctrl-C in a rollout", 65))
    assert status == 1 and lines[-1] == "KeyboardInterrupt"
    assert f"--resume {only_run(tmp_path).relative_to(tmp_path)}" in (tmp_path / "out").read_text()
    assert state(tmp_path)["episode"] == 6  # after 20 steps of the references, 20 of training, 10 of evaluation, 15
    assert not list(tmp_path.glob("runs/*/checkpoint.new"))


def test_resumed_from_any_checkpoint_ends_the_same_and_logs_nothing_twice(tmp_path, monkeypatch):
    """As if killed right before the next checkpoint: all of the later events are in the file already."""
    checkpoints, on_disk, waiting = [], [], []

    def keep(source, target, replace=os.replace):
        checkpoints.append(pathlib.Path(source).read_bytes())
        on_disk.append(logged(tmp_path))
        replace(source, target)

    def flush(writer, add_event=EventFileWriter.add_event, flush=EventFileWriter.flush):
        while waiting:
            add_event(writer, waiting.pop(0))
        flush(writer)

    monkeypatch.setattr(os, "replace", keep)
    # the latest that an event may be written is when the writer is flushed
    monkeypatch.setattr(EventFileWriter, "add_event", lambda writer, event: waiting.append(event))
    monkeypatch.setattr(EventFileWriter, "flush", flush)
    result = train(Args(**SMALL, episodes=6, eval_every=2))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    number_events(tmp_path)
    run, end, log = only_run(tmp_path), state(tmp_path), logged(tmp_path)
    assert len(checkpoints) == 7  # the one before the first update, too
    # nothing that a checkpoint goes on from is still unwritten when it appears
    for episode, there in enumerate(on_disk):
        until = {tag: [(step, value) for step, value in events if step <= episode] for tag, events in log.items()}
        assert there == {tag: events for tag, events in until.items() if events}
    for checkpoint in checkpoints[::2]:
        (run / "checkpoint.pt").write_bytes(checkpoint)
        assert train(Args(resume=str(run))) == result
        number_events(tmp_path)
        assert same(state(tmp_path), end)
        assert logged(tmp_path) == log


def refusal(folder, **options):
    """The one line that `python dgpg.py --resume folder` ends with."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", ["dgpg.py", *flags(resume=folder, **options)])
        runpy.run_path(str(pathlib.Path(dgpg.__file__)), run_name="__main__")
    (line,) = exit.value.code.splitlines()
    return line


def test_a_checkpoint_that_is_cut_short_is_refused_and_nothing_is_touched(tmp_path):
    train(Args(**SMALL, episodes=1))
    run = only_run(tmp_path)
    path = run / "checkpoint.pt"
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        before = contents(tmp_path)
        assert refusal(run).startswith(f"{run}/checkpoint.pt cannot be used: "), size
        assert contents(tmp_path) == before


def test_what_cannot_be_resumed(tmp_path):
    train(Args(**SMALL, episodes=1))
    run = only_run(tmp_path)
    before = contents(tmp_path)
    assert "missing" in refusal("missing")
    assert "give no other" in refusal(run, seed=2)
    assert "cannot be used" in refusal("")  # of a shell variable that is not set
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    pathlib.Path("older").mkdir()
    for other in ({"actor": saved["actor"]}, saved | {"args": saved["args"] | {"norm_adv": True}}):
        torch.save(other, "older/checkpoint.pt")
        assert "must be a run of this dgpg.py" in refusal("older")
    shutil.rmtree("older")
    with pytest.raises(InputError, match="a run of this mappo.py"):
        mappo.train(mappo.Args(resume=str(run)))
    assert contents(tmp_path) == before
    # the same parts in the same shapes as DG-PG's and IPPO's actor
    mappo.train(mappo.Args(**SMALL, num_envs=1, episodes=1))
    (other,) = (path for path in (tmp_path / "runs").iterdir() if path != run)
    for script in (dgpg, ippo):
        with pytest.raises(InputError, match="must be a run of this"):
            script.train(script.Args(resume=str(other)))


def test_a_finished_run_resumes_to_its_last_line(tmp_path, capsys):
    result = train(Args(**SMALL, episodes=2))
    last = capsys.readouterr().out.splitlines()[-1].split(" seconds=")[0]
    before, path = logged(tmp_path), only_run(tmp_path) / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"seconds": 1000.0}, path)
    assert train(Args(resume=str(only_run(tmp_path)))) == result
    again, seconds = capsys.readouterr().out.splitlines()[-1].split(" seconds=")
    assert again == last and float(seconds) >= 1000  # of the whole run
    assert logged(tmp_path) == before


class Foreign:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_pickle_is_not_executed(tmp_path):
    train(Args(**SMALL, episodes=0))
    run = only_run(tmp_path)
    torch.save({"actor": Foreign(), "args": {}, "script": "dgpg.py"}, "foreign.pt")
    pathlib.Path("plain.pt").write_bytes(pickle.dumps(Foreign()))
    (run / "checkpoint.pt").write_bytes(pathlib.Path("foreign.pt").read_bytes())
    with pytest.raises(InputError, match="checkpoint.pt"):
        train(Args(resume=str(run)))
    for name in ("foreign.pt", "plain.pt"):
        with pytest.raises(InputError, match=name):
            train(Args(**SMALL, init_actor=name))
    assert not os.path.exists("executed")


@pytest.mark.parametrize("broken", ["reward", "guidance", "gradient"])
def test_numbers_that_go_wrong_stop_the_run(tmp_path, monkeypatch, broken):
    """From the third episode on: the last checkpoint is the second's."""
    calls = itertools.count(1)
    step, guidance, huber = dgpg.CloudEnv.step, dgpg.guidance, torch.nn.functional.huber_loss

    def wrong_reward(self, actions):
        obs, reward, *rest = step(self, actions)
        if self.num_envs == 1 and self.t == 5 and next(calls) >= 3:
            reward = reward * math.inf
        return obs, reward, *rest

    def wrong_guidance(*args):
        return guidance(*args) * (math.nan if next(calls) >= 5 else 1)  # of two updates per episode

    def wrong_gradient(*args, **options):
        value = huber(*args, **options)
        if next(calls) == 3 * 2 * 2 * 2:  # the third episode's last minibatch: two updates, epochs, minibatches
            value.register_hook(lambda gradient: gradient * math.inf)
        return value

    if broken == "reward":
        monkeypatch.setattr(dgpg.CloudEnv, "step", wrong_reward)
    elif broken == "guidance":
        monkeypatch.setattr(dgpg, "guidance", wrong_guidance)
    else:
        monkeypatch.setattr(torch.nn.functional, "huber_loss", wrong_gradient)
    with pytest.raises(AssertionError, match="finite"):
        train(Args(**SMALL, episodes=9, eval_every=9))
    checkpoint = state(tmp_path)
    assert checkpoint["episode"] == 2
    assert all(weight.isfinite().all() for weight in checkpoint["actor"].values())


ONE = dict.fromkeys(("n_agents", "servers_per_agent", "rounds", "num_steps", "num_minibatches"), 1)
ONE |= dict(minibatch_agents=1, hidden=1, num_envs=2)
EDGES = {
    "one of everything": ONE,
    "one agent, and more in reach and in a minibatch": dict(n_agents=1, servers_per_agent=99, minibatch_agents=10**9),
    "one server in reach": dict(servers_per_agent=1),
    "three environments of one round, a minibatch each": dict(
        num_envs=3, episodes=3, rounds=1, num_steps=1, num_minibatches=3
    ),
    "minibatches that do not divide the batch, of one agent": dict(num_minibatches=3, minibatch_agents=1),
    "no learning, evaluated never but at the end": dict(learning_rate=0, gamma=0, gae_lambda=0, eval_every=10**9),
    "no clipping, no gradient": dict(clip_coef=0, max_grad_norm=0),
    "hardly any load, one minibatch per state": dict(load=1e-6, num_minibatches=5),
    "far too much load, no discount": dict(load=1000, gamma=1, gae_lambda=1),
    "one actor per agent": dict(share_parameters=False, ent_coef=0.01),
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
        [f"\ufeffid,{HEADER},zone", *(f"{i},{i},5,1,2,b" for i in range(300))]
    ),
    "simultaneous arrivals": "\n".join([HEADER, *(f"{i // 100},5,1,2" for i in range(300))]),
    "durations of 0 and 1e9": "\n".join([HEADER, *(f"{i},{[0, 1e9, 5][i % 3]},1,2" for i in range(300))]),
}


@pytest.mark.parametrize("text", TRACES.values(), ids=TRACES)
def test_traces_at_their_edges_train(text):
    pathlib.Path("trace.csv").write_bytes(text.encode())
    assert math.isfinite(train(Args(**SMALL, episodes=1, trace="trace.csv"))["return"])


def test_a_trace_of_a_hundred_thousand_rows():
    rows = [f"{i},{1 + i % 50},{1 + i % 3},2" for i in range(10**5)]
    pathlib.Path("trace.csv").write_text("\n".join([HEADER, *rows]))
    assert math.isfinite(train(Args(**SMALL, episodes=1, trace="trace.csv"))["return"])
