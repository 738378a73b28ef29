"""Runs that are interrupted, damaged, fed with nonsense or left without disk space: nothing lost, nothing silent."""

import itertools
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import runpy
import shutil
import signal
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import dgpg
import ippo
import mappo
from dgpg import Args, train

SMALL = dict(n_agents=3, rounds=10, load=2.0, num_minibatches=2, update_epochs=2, minibatch_agents=2)
PROCESSES = multiprocessing.get_context("forkserver")  # children start with the packages imported
PROCESSES.set_forkserver_preload(["torch", "torch.utils.tensorboard", "tyro"])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_in(folder, script, *options, file_size=None):
    """`python script options` in `folder`, in this process; what it prints goes to the files out and err there."""
    os.chdir(folder)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = [script, *options]
    runpy.run_path(str(pathlib.Path(dgpg.__file__).parent / script), run_name="__main__")


def start(folder, script, *options, **limits):
    folder.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=run_in, args=(folder, script, *options), kwargs=limits)
    process.start()
    return process


def run(folder, script, *options, **limits):
    """Exit status and lines on stderr of a whole run."""
    process = start(folder, script, *options, **limits)
    process.join()
    return process.exitcode, (folder / "err").read_text().splitlines()


def flags(**options):
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def logged(folder):
    """Every scalar of the only run in `folder` but wall times, as TensorBoard shows it."""
    events = EventAccumulator(str(only_run(folder))).Reload()
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def state(folder):
    """The last checkpoint's contents but wall times."""
    checkpoint = torch.load(only_run(folder) / "checkpoint.pt", weights_only=True)
    del checkpoint["train_seconds"]
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


@pytest.mark.parametrize("script, kills", [("dgpg.py", 10), ("ippo.py", 2)])
def test_killed_at_any_moment_and_resumed_ends_as_if_never_killed(tmp_path, script, kills):
    options = flags(**SMALL, num_envs=2, episodes=160, eval_every=20, seed=5)
    assert run(tmp_path / "whole", script, *options) == (0, [])
    moments, folder, killed = random.Random(script), tmp_path / "killed", 0
    for _ in range(kills):
        checkpoints = list(folder.glob("runs/*/checkpoint.pt"))
        before = [path.stat().st_mtime_ns for path in checkpoints]
        process = start(folder, script, *(flags(resume=only_run(folder)) if checkpoints else options))
        while process.is_alive() and [path.stat().st_mtime_ns for path in folder.glob("runs/*/checkpoint.pt")] == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        time.sleep(1 - time.time() % 1)  # event files are ordered by the second that they were begun in
    assert killed == kills
    assert run(folder, script, *flags(resume=only_run(folder))) == (0, [])
    assert same(state(folder), state(tmp_path / "whole"))
    assert logged(folder) == logged(tmp_path / "whole")


def test_resumed_from_any_checkpoint_ends_the_same_and_logs_nothing_twice(tmp_path, monkeypatch):
    """As if the run had been killed right before the next checkpoint: with all of the later events in the file already."""
    checkpoints, on_disk, replace = [], [], os.replace

    def keep(source, target):
        checkpoints.append(pathlib.Path(source).read_bytes())
        on_disk.append(logged(tmp_path))
        replace(source, target)

    def slow_write(writer, data, write=RecordWriter.write):
        time.sleep(0.02)  # events are still waiting when the checkpoint is due
        write(writer, data)

    monkeypatch.setattr(os, "replace", keep)
    monkeypatch.setattr(RecordWriter, "write", slow_write)
    result = train(Args(**SMALL, episodes=6, eval_every=2))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run, end, log = only_run(tmp_path), state(tmp_path), logged(tmp_path)
    assert len(checkpoints) == 7  # the one before the first update, too
    for episode, there in enumerate(on_disk):  # nothing that a checkpoint goes on from is still unwritten when it appears
        until = {tag: [(step, value) for step, value in events if step <= episode] for tag, events in log.items()}
        assert there == {tag: events for tag, events in until.items() if events}
    for checkpoint in checkpoints[::2]:
        time.sleep(1 - time.time() % 1)  # event files are ordered by the second that they were begun in
        (run / "checkpoint.pt").write_bytes(checkpoint)
        assert train(Args(resume=str(run))) == result
        assert same(state(tmp_path), end)
        assert logged(tmp_path) == log


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    options = flags(**SMALL, episodes=10**6, eval_every=10**6)
    process = start(tmp_path, "dgpg.py", *options)
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    folder = only_run(tmp_path).relative_to(tmp_path)
    assert (tmp_path / "err").read_text() == f"dgpg.py: interrupted, go on with: python dgpg.py --resume {folder}\n"
    assert state(tmp_path)["episode"] > 0
    assert not list(tmp_path.glob("runs/*/checkpoint.new"))


def resume(folder, capsys, **options):
    """The one line on stderr of `python dgpg.py --resume folder` in this process, which must end with status 2."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", ["dgpg.py", *flags(resume=folder, **options)])
        runpy.run_path(str(pathlib.Path(dgpg.__file__)), run_name="__main__")
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_damaged_checkpoints_are_refused_and_nothing_is_touched(tmp_path, capsys):
    train(Args(**SMALL, episodes=1))
    capsys.readouterr()
    run, rng = only_run(tmp_path), random.Random(1)
    path = run / "checkpoint.pt"
    whole, intact = path.read_bytes(), state(tmp_path)
    refused = 0
    for trial in range(60):
        damaged = bytearray(whole)
        if trial < 10:
            del damaged[rng.randrange(len(whole)) :]
        else:
            place = rng.randrange(len(whole))
            damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        before = contents(tmp_path)
        try:
            dgpg.load_checkpoint(run)
        except ValueError:
            refused += 1
            if refused % 10 == 1:
                assert resume(run, capsys).startswith(f"dgpg.py: error: resume {run}: no checkpoint to go on with: ")
        else:  # a bit of the padding between the parts: what is read is what was written
            assert trial >= 10 and same(state(tmp_path), intact)
        assert contents(tmp_path) == before
    assert refused > 30


def test_what_cannot_be_resumed(tmp_path, capsys):
    train(Args(**SMALL, episodes=1))
    run = only_run(tmp_path)
    capsys.readouterr()
    before = contents(tmp_path)
    assert "missing" in resume("missing", capsys)
    assert "give no other" in resume(run, capsys, seed=2)
    with pytest.raises(ValueError, match="belongs to dgpg.py"):
        mappo.train(mappo.Args(resume=str(run)))
    assert contents(tmp_path) == before
    mappo.train(mappo.Args(**SMALL, num_envs=1, episodes=1))  # the same parts in the same shapes as DG-PG's and IPPO's actor
    (other,) = (path for path in (tmp_path / "runs").iterdir() if path != run)
    for script in (dgpg, ippo):
        with pytest.raises(ValueError, match="belongs to mappo.py"):
            script.train(script.Args(resume=str(other)))


def test_a_finished_run_resumes_to_its_last_line(tmp_path, capsys):
    result = train(Args(**SMALL, episodes=2))
    last = capsys.readouterr().out.splitlines()[-1].split(" seconds=")[0]
    before = logged(tmp_path)
    assert train(Args(resume=str(only_run(tmp_path)))) == result
    assert capsys.readouterr().out.splitlines()[-1].split(" seconds=")[0] == last
    assert logged(tmp_path) == before


class Foreign:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_pickle_is_not_executed(tmp_path, capsys):
    train(Args(**SMALL, episodes=0))
    run = only_run(tmp_path)
    torch.save({"actor": Foreign(), "args": {}, "script": "dgpg.py"}, "foreign.pt")
    pathlib.Path("plain.pt").write_bytes(pickle.dumps(Foreign()))
    (run / "checkpoint.pt").write_bytes(pathlib.Path("foreign.pt").read_bytes())
    with pytest.raises(ValueError, match="resume"):
        train(Args(resume=str(run)))
    for name in ("foreign.pt", "plain.pt"):
        with pytest.raises(ValueError, match="init_actor"):
            train(Args(**SMALL, init_actor=name))
    assert not os.path.exists("executed")


@pytest.mark.parametrize("broken", ["reward", "policy_loss", "critic_grad_norm"])
def test_numbers_that_go_wrong_stop_the_run(tmp_path, monkeypatch, broken):
    """From the third update on: it is not in the last checkpoint, and the message says which tensor and where that is."""
    updates = itertools.count(1)
    place, loss, huber = dgpg.CloudEnv.place, dgpg.guided_advantage, torch.nn.functional.huber_loss

    def wrong_reward(self, servers):
        obs, reward, *rest = place(self, servers)
        if self.num_envs == 1 and self.t == 5 and next(updates) >= 3:
            reward = reward * math.inf
        return obs, reward, *rest

    def wrong_advantage(*args):
        advantages, g = loss(*args)
        return (advantages * math.nan if next(updates) >= 3 else advantages), g

    def wrong_gradient(*args, **options):
        value = huber(*args, **options)
        if next(updates) > 2 * 2 * 2:  # two updates of two epochs of two minibatches
            value.register_hook(lambda gradient: gradient * math.inf)
        return value

    if broken == "reward":
        monkeypatch.setattr(dgpg.CloudEnv, "place", wrong_reward)
    elif broken == "policy_loss":
        monkeypatch.setattr(dgpg, "guided_advantage", wrong_advantage)
    else:
        monkeypatch.setattr(torch.nn.functional, "huber_loss", wrong_gradient)
    with pytest.raises(FloatingPointError, match=f"{broken} is not finite in the update at episode 3: .*checkpoint.pt"):
        train(Args(**SMALL, episodes=9, eval_every=9))
    checkpoint = state(tmp_path)
    assert checkpoint["episode"] == 2
    assert all(weight.isfinite().all() for weight in checkpoint["actor"].values())


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    """The limit on a file's size stands in for the disk: the event file outgrows it, or the checkpoint does."""
    assert run(tmp_path / "first", "dgpg.py", *flags(**SMALL, episodes=1))[0] == 0
    size = (only_run(tmp_path / "first") / "checkpoint.pt").stat().st_size
    for name, limit in (("checkpoint", size - 10_000), ("events", size + 10_000)):
        folder = tmp_path / name
        status, lines = run(folder, "dgpg.py", *flags(**SMALL, episodes=10**4, eval_every=1), file_size=limit)
        assert status == 2 and len(lines) == 1 and lines[0].startswith("dgpg.py: error: "), (name, lines)
        if name == "events":
            assert state(folder)["episode"] > 0


EDGES = {
    "one agent": dict(n_agents=1),
    "one server in reach": dict(servers_per_agent=1),
    "one agent with one server, one round": dict(n_agents=1, servers_per_agent=1, rounds=1, num_minibatches=1),
    "more servers in reach than there are": dict(servers_per_agent=99),
    "one round": dict(rounds=1, num_minibatches=1),
    "several environments": dict(num_envs=3, episodes=3),
    "one minibatch per state": dict(num_minibatches=10),
    "a batch that the minibatches do not divide": dict(num_minibatches=3),
    "one agent in a minibatch": dict(minibatch_agents=1),
    "more agents in a minibatch than there are": dict(minibatch_agents=10**9),
    "one unit": dict(hidden=1),
    "no learning": dict(learning_rate=0, gamma=0, gae_lambda=0),
    "no discount": dict(gamma=1, gae_lambda=1),
    "no clipping, no gradient": dict(clip_coef=0, max_grad_norm=0, vf_coef=0),
    "hardly any load": dict(load=1e-6),
    "far too much load": dict(load=1000),
    "evaluated never but at the end": dict(eval_every=10**9),
    "ends at the first divergence": dict(target_kl=0),
    "not standardised": dict(norm_adv=False),
    "the largest seed": dict(seed=99_999),
    "one actor per agent": dict(share_parameters=False, ent_coef=0.01),
}


@pytest.mark.parametrize("script", [dgpg, mappo, ippo])
@pytest.mark.parametrize("options", EDGES.values(), ids=EDGES)
def test_options_at_their_edges_train(script, options):
    result = script.train(script.Args(**{**SMALL, "num_envs": 1, "episodes": 2, **options}))
    assert math.isfinite(result["return"]) and result["return"] <= 0


HEADER = "arrival_s,duration_s,cpu,memory_gib"
TRACES = {
    "CRLF, a byte order mark and more columns": "\ufeff" + "\r\n".join(["id," + HEADER + ",zone", *(f"{i},{i},5,1,2,b" for i in range(300))]),
    "simultaneous arrivals": "\n".join([HEADER, *(f"{i // 100},5,1,2" for i in range(300))]),
    "durations of 0 and 1e9": "\n".join([HEADER, *(f"{i},{[0, 1e9, 5][i % 3]},1,2" for i in range(300))]),
}


@pytest.mark.parametrize("text", TRACES.values(), ids=TRACES)
def test_traces_at_their_edges_train(text):
    pathlib.Path("trace.csv").write_bytes(text.encode())
    assert math.isfinite(train(Args(**SMALL, episodes=1, trace="trace.csv"))["return"])


def test_a_trace_of_a_million_rows():
    row = "{0},{1},{2},2\n"
    pathlib.Path("trace.csv").write_text(HEADER + "\n" + "".join(row.format(i, 1 + i % 50, 1 + i % 3) for i in range(10**6)))
    assert math.isfinite(train(Args(**SMALL, episodes=1, trace="trace.csv"))["return"])
