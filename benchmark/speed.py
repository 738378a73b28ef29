"""Where the time goes: environment, policy, update, evaluation; the update beside its matrix products alone; other MAPPOs' setting.

One thread, so that CPU seconds, which other work on the machine disturbs less, are those of the clock. Medians. Prints tables.
"""

import contextlib
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


def phases(n_agents, episodes, products_alone):
    """CPU seconds per episode of DG-PG: rollout, advantages and guidance, update (with logging and the checkpoint).

    Told apart by the calls that begin them: `reset` of the one training environment, `gae`, and the end of `guided_advantage`.
    There `products_alone()` is timed, too, next to the update because the machine's speed changes: "products", and their "ratio".
    """
    marks, bare = [], []
    reset, gae, guided, evaluation = CloudEnv.reset, dgpg.gae, dgpg.guided_advantage, dgpg.evaluate

    def marked_reset(self, seed=None, options=None):
        if seed:  # not the one for the shapes
            marks.append(("rollout", time.process_time()))
        return reset(self, seed, options)

    def marked_gae(*args):
        marks.append(("advantages", time.process_time()))
        return gae(*args)

    def marked_guided(*args):
        result = guided(*args)
        marks.append(("products", time.process_time()))
        bare.append(products_alone())
        marks.append(("update", time.process_time()))
        return result

    CloudEnv.reset, dgpg.gae, dgpg.guided_advantage = marked_reset, marked_gae, marked_guided
    dgpg.evaluate = lambda env, policy, seed, scenarios: (np.zeros(1), np.zeros((env.rounds, env.n_servers, 2)))
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        os.chdir(folder)
        dgpg.train(dgpg.Args(n_agents=n_agents, episodes=episodes + 1, eval_every=episodes + 1))
        os.chdir(here)
    CloudEnv.reset, dgpg.gae, dgpg.guided_advantage, dgpg.evaluate = reset, gae, guided, evaluation
    spent = {}
    for (name, begin), (_, end) in zip(marks, marks[1:]):  # the last update has no end: it holds the final evaluation
        spent.setdefault(name, []).append(end - begin)
    spent["products"] = bare[:-1]
    spent["ratio"] = np.divide(spent["update"], spent["products"])
    return {name: np.median(seconds[1:]) for name, seconds in spent.items()}


def products(rows, sizes, repeats):
    """Seconds of the matrix products alone of one forward and backward pass of an MLP: x W; then W's and, but for the first, x's."""
    pairs = [(torch.randn(rows, a), torch.randn(a, b), torch.randn(rows, b)) for a, b in zip(sizes, sizes[1:])]
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for layer, (x, weight, gradient) in enumerate(pairs):
            x @ weight
            x.T @ gradient
            if layer:
                gradient @ weight.T
        times.append(time.process_time() - start)
    return np.median(times)


def main(args):
    torch.set_num_threads(1)
    # whole commands first: the memory of a process counts that of the one that started it
    if args.peers:
        print("mappo.py, 10 environments x 100 rounds an update, 10 epochs x 1 minibatch of all states, two hidden layers of 64, one thread")
        print("| N | rows scored for a decision | agents in a minibatch | agent-steps/s | peak MiB | fastest peer | ratio |\n" + "|---" * 7 + "|")
        setting = "--num-envs 10 --hidden 64 --num-minibatches 1 --update-epochs 10 --episodes 40 --eval-every 40"
        for n, (speed, peer) in PEERS.items():
            for rows in (8, 1):  # servers in reach; the peers' actors score an observation at once
                for agents in sorted({n, min(n, dgpg.Args().minibatch_agents)}):
                    row = run("mappo.py", n, 1, f"{setting} --minibatch-agents {agents} --servers-per-agent {rows}")[-1]
                    ratio = float(row["sps"]) / speed
                    print(f"| {n} | {min(rows, n)} | {agents} | {row['sps']} | {row['peak_mib']} | {peer} {speed:,} | {ratio:.2f} |", flush=True)
        print()

    print("| N | evaluation of 40 scenarios, s | Best-Fit on them, s | default run, s | peak MiB | evaluation and Best-Fit / run |\n|---|---|---|---|---|---|")
    for n in (size for size in args.sizes if size <= 1000):  # above, evaluation takes longer than training
        row = run("dgpg.py", n, 1, "")[-1]
        env = CloudEnv(40, n)
        actor = dgpg.MLP(1, OBS_FEATURES, dgpg.Args().hidden, 0.01)

        def policy(env, obs):
            with torch.inference_mode():
                actions = torch.distributions.Categorical(logits=actor(torch.as_tensor(obs).transpose(0, 1))).sample()
            return env.reach[np.arange(env.n_agents), actions.T.numpy()]

        seconds = []
        for chosen in (policy, best_fit):
            start = time.process_time()
            evaluate(env, chosen, EVAL_SEED, 40)
            seconds.append(time.process_time() - start)
        print(
            f"| {n} | {seconds[0]:.1f} | {seconds[1]:.1f} | {row['seconds']} | {row['peak_mib']} | {sum(seconds) / float(row['seconds']):.0%} |",
            flush=True,
        )

    print("\n| N | environment only, agent-steps/s | rollout | training | s per episode: rollout | advantages | update | products alone | update / products |")
    print("|---|---|---|---|---|---|---|---|---|")
    for n in args.sizes:
        env, times = CloudEnv(1, n), []
        for repeat in range(args.episodes):
            start = time.process_time()
            evaluate(env, random_policy, repeat)
            times.append(time.process_time() - start)
        options = dgpg.Args()
        states = env.rounds // options.num_minibatches
        rows = min(n, options.minibatch_agents) * states * env.reach.shape[1]

        def products_alone():
            minibatch = products(rows, [OBS_FEATURES, options.hidden, options.hidden, 1], repeats=10)
            minibatch += products(states, [2 * n + 2, 64, 64, 1], repeats=10)
            return minibatch * options.update_epochs * options.num_minibatches

        steps, spent = n * env.rounds, phases(n, args.episodes, products_alone)
        training = spent["rollout"] + spent["advantages"] + spent["update"]
        print(
            f"| {n} | {steps / np.median(times):,.0f} | {steps / spent['rollout']:,.0f} | {steps / training:,.0f} | {spent['rollout']:.3f} "
            f"| {spent['advantages']:.3f} | {spent['update']:.3f} | {spent['products']:.3f} | {spent['ratio']:.2f} |",
            flush=True,
        )

    if args.peers:
        print("\nagent-steps/s that the actor's matrix products alone would allow in the other libraries' setting")
        print("| N | 8 rows for a decision | 1 |\n|---|---|---|")
        for n in PEERS:
            seconds = [10 * products(n * 1000 * min(rows, n), [OBS_FEATURES, 64, 64, 1], repeats=3) for rows in (8, 1)]
            print(f"| {n} | " + " | ".join(f"{n * 1000 / s:,.0f}" for s in seconds) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args))
