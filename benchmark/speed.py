"""Where the time goes: environment, policy, update, evaluation; the update beside its matrix products alone; other MAPPOs' setting.

One thread. Times are medians; run it on a machine that does nothing else. Prints tables.
"""

import os
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from runs import run

import dgpg
from cloud_env import EVAL_SEED, OBS_FEATURES, CloudEnv, best_fit, evaluate, random_policy

PEERS = {5: (9_600, "BenchMARL"), 50: (38_000, "BenchMARL"), 200: (41_000, "BenchMARL")}  # agent-steps per second, the fastest


@dataclass
class Args:
    sizes: tuple[int, ...] = (5, 50, 200, 1500, 10_000)
    """numbers of agents"""
    episodes: int = 6
    """training episodes to time, the first left out"""
    peers: bool = True
    """also time mappo.py in other libraries' setting"""


def phases(n_agents, episodes):
    """Seconds per episode of DG-PG in rollout, guidance and advantages, and update, by the calls that begin and end them."""
    marks = []

    def marked(name, function, before=True):
        def call(*args, **options):
            if before:
                marks.append((name, time.perf_counter()))
            result = function(*args, **options)
            if not before:
                marks.append((name, time.perf_counter()))
            return result

        return call

    kept = dgpg.gae, dgpg.guided_advantage, dgpg.evaluate, torch.stack
    here = os.getcwd()
    stack_calls = {"n": 0}

    def stack(parts, *args, **options):  # the first large stack after an update is that of its losses
        if len(parts) == 80 and parts[0].ndim == 1:
            marks.append(("logs", time.perf_counter()))
        return kept[3](parts, *args, **options)

    reset = CloudEnv.reset

    def marked_reset(self, seed=None, options=None):
        if self.num_envs == 1 and seed:
            marks.append(("rollout", time.perf_counter()))
        return reset(self, seed, options)

    dgpg.gae, torch.stack, CloudEnv.reset = marked("advantages", dgpg.gae), stack, marked_reset
    dgpg.guided_advantage = marked("update", dgpg.guided_advantage, before=False)
    dgpg.evaluate = lambda env, policy, seed, scenarios: (np.zeros(1), np.zeros((env.rounds, env.n_servers, 2)))
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            dgpg.train(dgpg.Args(n_agents=n_agents, episodes=episodes, eval_every=episodes))
    finally:
        dgpg.gae, dgpg.guided_advantage, dgpg.evaluate, torch.stack = kept
        CloudEnv.reset = reset
        os.chdir(here)
    del stack_calls
    spent = {}
    for (name, begin), (_, end) in zip(marks, marks[1:]):
        if name != "logs":
            spent.setdefault(name, []).append(end - begin)
    return {name: np.median(seconds[1:]) for name, seconds in spent.items()}


def products(rows, sizes):
    """Seconds of the matrix products alone of one forward and backward pass of an MLP: x W; then W's and, but for the first, x's."""
    pairs = [(torch.randn(rows, a), torch.randn(a, b), torch.randn(rows, b)) for a, b in zip(sizes, sizes[1:])]
    times = []
    for _ in range(30):
        start = time.perf_counter()
        for layer, (x, weight, gradient) in enumerate(pairs):
            x @ weight
            x.T @ gradient
            if layer:
                gradient @ weight.T
        times.append(time.perf_counter() - start)
    return np.median(times)


def main(args):
    torch.set_num_threads(1)
    print("| N | environment only, agent-steps/s | rollout | training | s per episode: rollout | advantages | update | products alone | update / products |")
    print("|---|---|---|---|---|---|---|---|---|")
    for n in args.sizes:
        env, times = CloudEnv(1, n), []
        for repeat in range(args.episodes):
            start = time.perf_counter()
            evaluate(env, random_policy, repeat)
            times.append(time.perf_counter() - start)
        steps, spent, options = n * env.rounds, phases(n, args.episodes), dgpg.Args()
        states = env.rounds // options.num_minibatches
        alone = products(min(n, options.minibatch_agents) * states * env.reach.shape[1], [OBS_FEATURES, 32, 32, 1])
        alone += products(states, [2 * n + 2, 64, 64, 1])
        alone *= options.update_epochs * options.num_minibatches
        print(
            f"| {n} | {steps / np.median(times):,.0f} | {steps / spent['rollout']:,.0f} | {steps / sum(spent.values()):,.0f} "
            f"| {spent['rollout']:.3f} | {spent['advantages']:.3f} | {spent['update']:.3f} | {alone:.3f} | {spent['update'] / alone:.2f} |",
            flush=True,
        )

    print("\n| N | evaluation of 40 scenarios, s | Best-Fit on them, s | default run, s | peak MiB | evaluation and Best-Fit / run |\n|---|---|---|---|---|---|")
    for n in args.sizes:
        env = CloudEnv(40 if n <= 1000 else 4, n)
        actor = dgpg.MLP(1, OBS_FEATURES, 32, 0.01)

        def policy(env, obs):
            with torch.inference_mode():
                actions = torch.distributions.Categorical(logits=actor(torch.as_tensor(obs).transpose(0, 1))).sample()
            return env.reach[np.arange(env.n_agents), actions.T.numpy()]

        seconds = []
        for chosen in (policy, best_fit):
            start = time.perf_counter()
            evaluate(env, chosen, EVAL_SEED, 40)
            seconds.append(time.perf_counter() - start)
        row = run("dgpg.py", n, 1, "" if n <= 1500 else "--episodes 2 --eval-every 2")[-1]
        print(
            f"| {n} | {seconds[0]:.1f} | {seconds[1]:.1f} | {row['seconds']} | {row['peak_mib']} | {sum(seconds) / float(row['seconds']):.0%} |",
            flush=True,
        )

    if args.peers:
        print("\nmappo.py, 10 environments x 100 rounds an update, 10 epochs x 1 minibatch of all states, two hidden layers of 64, one thread")
        print("| N | agents in a minibatch | agent-steps/s | peak MiB | fastest peer | ratio |\n|---|---|---|---|---|---|")
        setting = "--num-envs 10 --hidden 64 --num-minibatches 1 --update-epochs 10 --episodes 60 --eval-every 60"
        for n, (speed, peer) in PEERS.items():
            for agents in sorted({n, min(n, dgpg.Args().minibatch_agents)}):
                row = run("mappo.py", n, 1, f"{setting} --minibatch-agents {agents}")[-1]
                print(f"| {n} | {agents} | {row['sps']} | {row['peak_mib']} | {peer} {speed:,} | {float(row['sps']) / speed:.2f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
