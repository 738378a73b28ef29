"""What several test files need."""

import itertools
import os
import pathlib

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import analytic_model
import dgpg
import ippo
import mappo
from cloud_env import CloudEnv
from examples.power import power_model
from examples.power.power_env import PowerEnv
from examples.traffic import traffic_model
from examples.traffic.traffic_env import TrafficEnv

ROOT = pathlib.Path(dgpg.__file__).parent
HEADER = "arrival_s,duration_s,cpu,memory_gib\n"
SECONDS = itertools.count(1)
SCRIPTS = pytest.mark.parametrize("script", [dgpg, mappo, ippo])
SYSTEMS = pytest.mark.parametrize(  # made by system(num_envs, n_agents, rounds, load, actions)
    "system, model", [(CloudEnv, analytic_model), (TrafficEnv, traffic_model), (PowerEnv, power_model)]
)


def handed_out(env, info):
    """What the model may be given of a round, as tensors by name."""
    return {name: torch.tensor(value) for name, value in (info["played"] | env.constants).items()}


def play(env, before=2, actions=None, seed=3):
    """After some random rounds one with these actions, or a random one. Returns its reward and what is handed out."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    E, N, K, _ = obs.shape
    for _ in range(before):
        env.step(rng.integers(K, size=(E, N)))
    _, reward, _, _, info = env.step(rng.integers(K, size=(E, N)) if actions is None else actions)
    return reward, handed_out(env, info)


def only_run(name="*"):
    """The folder of the only run of that name."""
    (run,) = pathlib.Path("runs").glob(f"{name}__n*")
    return run


def scalars(name="*"):
    """Every scalar of the only run of that name: {tag: [(step, value), ...]}."""
    read = EventAccumulator(str(only_run(name))).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def write_trace(path, rows):
    """A CSV file of rows (arrival, duration, vCPU, GiB)."""
    pathlib.Path(path).write_text(HEADER + "".join(",".join(map(str, row)) + "\n" for row in rows))
    second = next(SECONDS)
    os.utime(path, (second, second))  # by which `load_trace` tells files of one name apart
