"""Charging in the valley of the night. From the repository's root: python -m examples.power --n-agents 100"""

from dataclasses import dataclass

import dgpg
from cloud_env import InputError
from examples.power import power_model
from examples.power.power_env import PowerEnv


@dataclass
class Args(dgpg.Args):
    exp_name: str = "power"  # the name of this experiment
    episodes: int = 80  # training episodes: ten, of eight environments each
    num_envs: int = 8  # environments E that step together: with one or four some seeds never learn to spread
    load: float = 0.8  # energy of a night's cars as a fraction of what the valley below the ratings holds
    servers_per_agent: int = 8  # plans K of each car: start slots spread evenly over the night


def make_env(args, num_envs, held_out=False):
    if args.trace is not None:
        raise InputError("trace: this system has no traces")
    return PowerEnv(num_envs, args.n_agents, args.rounds, args.load, args.servers_per_agent)


if __name__ == "__main__":
    dgpg.main(Args, make_env, power_model)
