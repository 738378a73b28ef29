"""Route choice in Sioux Falls. From the repository's root: python -m examples.traffic --n-agents 100"""

from dataclasses import dataclass

import dgpg
from cloud_env import InputError
from examples.traffic import traffic_model
from examples.traffic.traffic_env import TrafficEnv


@dataclass
class Args(dgpg.Args):
    exp_name: str = "traffic"  # the name of this experiment
    load: float = 0.8  # mean demand as a fraction of the published trips
    servers_per_agent: int = 8  # routes K of each fleet, at most 100


def make_env(args, num_envs, held_out=False):
    if args.trace is not None:
        raise InputError("trace: this system has no traces")
    return TrafficEnv(num_envs, args.n_agents, args.rounds, args.load, args.servers_per_agent)


if __name__ == "__main__":
    dgpg.main(Args, make_env, traffic_model)
