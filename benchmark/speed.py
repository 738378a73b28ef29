"""Where the time of a whole run goes; the update beside its bare matrix products; the environment; other MAPPOs.

One thread. Prints tables; nothing else should be running.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import tyro
from runs import ROOT, head, run

import dgpg
import mappo
from cloud_env import CloudEnv

FEATURES = CloudEnv(1, 1).reset()[0].shape[-1]
PARTS = ("imports", "set-up", "references", "training", "evaluation", "writing")
PEERS = {5: 9_600, 50: 38_000, 200: 41_000}  # agent-steps per second of the fastest, BenchMARL, by N


@dataclass
class Args:
    sizes: tuple[int, ...] = (5, 50, 200, 1500, 10_000)  # numbers of agents
    one_episode: tuple[int, ...] = (100_000,)  # numbers of agents of runs of a single episode
    peers: bool = True  # also time mappo.py in other libraries' setting


def whole(n_agents, options):
    """A run of dgpg.py as a command. Returns the clock's seconds of it and of its parts, and its peak memory in MiB."""
    command = [sys.executable, "-P", str(ROOT / "benchmark" / "timed.py"), "--n-agents", str(n_agents), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmark'}"}
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/out", "w+") as out:
        start = time.time()
        process = subprocess.Popen(command, cwd=folder, stdout=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        spent = {"all": time.time() - start}
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        lines = out.read().splitlines()
    if process.returncode:
        return None
    spent |= {name: float(value) for name, value in (word.split("=") for word in lines[-1].split()[1:])}
    episodes, *_, sps, _ = [words for words in map(str.split, lines) if words and words[0].isdigit()][-1]
    spent["training"] = int(episodes) * dgpg.Args().rounds * n_agents / float(sps)
    return spent, usage.ru_maxrss // 1024, spent["training"] / int(episodes)


def products(rows, sizes):
    """Seconds of an MLP's matrix products alone, forward and backward: x W; then W's and, but for the first, x's."""
    for layer, (a, b) in enumerate(zip(sizes, sizes[1:])):
        x, weight, gradient = torch.randn(rows, a), torch.randn(a, b), torch.randn(rows, b)
        start = time.process_time()
        x @ weight
        x.T @ gradient
        if layer:
            gradient @ weight.T
        yield time.process_time() - start


def update(module, n_agents, **options):
    """CPU seconds of one minibatch's update, and of its matrix products alone, taken in turn: medians."""
    args = module.Args(n_agents=n_agents, eval_every=10**9, **options)
    states = args.num_steps * args.num_envs // args.num_minibatches
    rows = min(n_agents, args.minibatch_agents) * states * CloudEnv(1, n_agents).reach.shape[1]
    marks, bare, step = [], [], torch.optim.Adam.step

    def marked(optimizer):  # ends a minibatch
        step(optimizer)
        marks.append(time.process_time())
        actor = sum(products(rows, [FEATURES, args.hidden, args.hidden, 1]))
        bare.append(actor + sum(products(states, [5 * n_agents + 2, 64, 64, 1])))
        marks.append(time.process_time())

    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        os.chdir(folder)
        with mock.patch.object(torch.optim.Adam, "step", marked), mock.patch.object(module, "evaluate", lambda *_: -1):
            with mock.patch.object(CloudEnv, "__str__", lambda env: ""):
                module.train(args)
        os.chdir(here)
    between = np.diff(marks)[1::2]  # from the end of one minibatch's products to the end of the next minibatch
    return np.median(between), np.median(bare)


def main(args):
    torch.set_num_threads(1)
    # whole commands first: the memory of a process counts that of the one that started it
    head("N", "seconds", *PARTS, "beginning and end", "training, s per episode", "agent-steps/s", "peak MiB")
    for n in (*args.sizes, *args.one_episode):
        of_one = ["--episodes", "1", "--eval-scenarios", "1"] if n in args.one_episode else []
        measured = whole(n, of_one)
        if measured is None:
            print(f"| {n} | failed, see above |", flush=True)
            continue
        spent, mib, episode = measured
        rest = spent["all"] - sum(spent[name] for name in PARTS)
        seconds = [f"{spent[name]:.1f}" for name in ("all", *PARTS)] + [f"{rest:.1f}", f"{episode:.2f}"]
        print(f"| {n} | {' | '.join(seconds)} | {dgpg.Args().rounds * n / episode:,.0f} | {mib:,} |", flush=True)

    print("\none minibatch's update and its matrix products alone, ms of CPU")
    head("", "N", "update", "products", "ratio")
    for module, episodes in ((dgpg, 2), (mappo, 16)):
        for n in args.sizes[:4]:
            whole_update, bare = update(module, n, episodes=episodes)
            figures = f"{1e3 * whole_update:.2f} | {1e3 * bare:.2f} | {whole_update / bare:.2f}"
            print(f"| {module.__name__} | {n} | {figures} |", flush=True)

    print("\nthe environment alone, agent-steps/s of CPU")
    head("N", "one environment", "as in an evaluation")
    for n in args.sizes:
        speeds = []
        for count in (1, max(2, min(40, 2_000 // n))):
            env, times = CloudEnv(count, n), []
            for _ in range(3):
                start = time.process_time()
                dgpg.evaluate(env, lambda env, obs: np.zeros(obs.shape[:2], int))
                times.append(time.process_time() - start)
            speeds.append(f"{count * n * env.rounds / np.median(times):,.0f}")
        print(f"| {n} | {' | '.join(speeds)} |", flush=True)

    if args.peers:
        print(
            "\nmappo.py, 10 environments x 100 rounds an update, 10 epochs x 1 minibatch of all states, "
            "two hidden layers of 64, one thread"
        )
        columns = ("rows scored for a decision", "agents in a minibatch", "agent-steps/s", "fastest peer")
        head("N", *columns, "ratio")
        setting = "--num-envs 10 --hidden 64 --num-minibatches 1 --update-epochs 10 --episodes 40 --eval-every 40"
        for n, speed in PEERS.items():
            for rows in (8, 1):  # servers in reach; the peers' actors score an observation at once
                for agents in sorted({n, min(n, dgpg.Args().minibatch_agents)}):
                    row = run("mappo.py", n, 1, f"{setting} --minibatch-agents {agents} --servers-per-agent {rows}")[-1]
                    ratio = float(row["sps"]) / speed
                    figures = f"{row['sps']} | BenchMARL {speed:,} | {ratio:.2f}"
                    print(f"| {n} | {min(rows, n)} | {agents} | {figures} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
