"""`dgpg.py` with another reference state: `python benchmark/altered.py [options of dgpg.py] VARIANT`."""

import sys

import torch
import tyro
from runs import ROOT  # noqa: F401  (the path to dgpg.py)

import dgpg

VARIANTS = {  # the offered load [B, 2] that the reference state is told
    "zero_reference": lambda load: 0 * load,
    "stale_reference": lambda load: load[torch.arange(len(load)) // 10 * 10],  # held for 10 rounds
    "demand_30_percent_low": lambda load: 0.7 * load,
    "demand_30_percent_high": lambda load: 1.3 * load,
}

if __name__ == "__main__":
    altered, reference_state = VARIANTS[sys.argv.pop()], dgpg.reference_state
    dgpg.reference_state = lambda offered_load, **rest: reference_state(altered(offered_load), **rest)
    dgpg.train(tyro.cli(dgpg.Args))
