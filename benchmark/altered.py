"""`dgpg.py` with another reference state, for the ablations: `python benchmark/altered.py [options of dgpg.py] VARIANT`."""

import sys

import torch
import tyro
from runs import ROOT  # noqa: F401  (the path to dgpg.py)

import dgpg

reference_state = dgpg.reference_state
VARIANTS = {
    "zero_reference": lambda load, capacity: 0 * reference_state(load, capacity),
    "stale_reference": lambda load, capacity: reference_state(load[torch.arange(len(load)) // 10 * 10], capacity),  # held for 10 rounds
    "demand_30_percent_low": lambda load, capacity: reference_state(0.7 * load, capacity),
    "demand_30_percent_high": lambda load, capacity: reference_state(1.3 * load, capacity),
}

if __name__ == "__main__":
    dgpg.reference_state = VARIANTS[sys.argv.pop()]
    dgpg.train(tyro.cli(dgpg.Args))
