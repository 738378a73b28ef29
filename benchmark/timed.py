"""`dgpg.py`, saying where its time goes: `python benchmark/timed.py [options of dgpg.py]`.

The last line has seconds of parts that do not overlap; what is left of the process is its beginning and its end.
"""

import time

START = time.time()

import torch  # noqa: E402
import tyro  # noqa: E402
from runs import ROOT  # noqa: E402, F401  (the path to dgpg.py)

import dgpg  # noqa: E402

spent = {"imports": time.time() - START, "set-up": 0.0, "references": 0.0, "evaluation": 0.0, "writing": 0.0}
calls = []


def timed(function, name=None):
    """The function, its seconds added to `name`; of `evaluate` the first two calls are the reference policies."""

    def wrapped(*args, **kwargs):
        part = name or ("references" if len(calls) < 2 else "evaluation")
        begin = time.time()
        if name is None:
            calls.append(begin)
        result = function(*args, **kwargs)
        spent[part] += time.time() - begin
        return result

    return wrapped


if __name__ == "__main__":
    dgpg.evaluate, torch.save = timed(dgpg.evaluate), timed(torch.save, "writing")
    for name in ("__init__", "add_scalar", "add_text", "flush", "close"):
        setattr(dgpg.SummaryWriter, name, timed(getattr(dgpg.SummaryWriter, name), "writing"))
    args = tyro.cli(dgpg.Args)
    begin = time.time()
    dgpg.train(args)
    spent["set-up"] = calls[0] - begin
    print("spent", *(f"{name}={seconds:.2f}" for name, seconds in spent.items()))
