"""The baselines' learning rate, entropy bonus and batch where they are slow, at N = 20 and 50.

Writes results/tuning.csv (a run that is there is not repeated), and prints the table: first at Best-Fit, cost ratio.
"""

import tyro
from runs import RESULTS, Args, curves, head, listed, reached, read, sweep

RUN = "--episodes 1600 --eval-every 160"
SETTINGS = {  # (script, N): learning rate, weight of the entropy bonus, other changes
    ("mappo.py", 20): [
        *((rate, bonus, "") for rate in ("1e-3", "3e-3", "1e-2") for bonus in ("0", "0.01")),
        *(("1e-2", "0.03", ""), ("3e-2", "0.01", "")),
        *(("1e-3", "0", other) for other in ("--num-minibatches 16", "--num-envs 32")),
        ("3e-3", "0", "--num-envs 32"),
    ],
    ("mappo.py", 50): [
        ("1e-3", "0", ""),
        *((rate, bonus, "") for rate in ("3e-3", "1e-2") for bonus in ("0", "0.01")),
        ("3e-3", "0", "--num-minibatches 16"),
    ],
    **{
        ("ippo.py", n): [(rate, bonus, "") for rate in ("1e-3", "3e-3", "1e-2") for bonus in ("0", "0.01")]
        for n in (20, 50)
    },
}


def main(args):
    jobs = [
        (script, n, seed, f"{RUN} --learning-rate {rate} --ent-coef {bonus} {other}".strip())
        for (script, n), settings in SETTINGS.items()
        for rate, bonus, other in settings
        # more seeds where one leaves two settings close
        for seed in ((1, 2, 3) if script == "ippo.py" and rate == "1e-2" else (1,))
    ]
    rows = read(RESULTS / "tuning.csv") if args.only_show else sweep("tuning", jobs, args.workers)
    found = curves(rows)
    head("", "N", "settings", "first at Best-Fit", "cost ratio after 480 episodes", "800", "1,600")
    for script, n, options in dict.fromkeys((script, n, options) for script, n, _, options in jobs):
        seeds = [curve for _, curve in sorted(found.get((script, n, options), {}).items())]
        first = listed(reached(*curve, stays=False) for curve in seeds)
        at = [", ".join(f"{ratios[episodes == k][0]:.2f}" for episodes, ratios in seeds) for k in (480, 800, 1600)]
        name, settings = script.removesuffix(".py").upper(), options.removeprefix(RUN).strip()
        print(f"| {name} | {n} | `{settings}` | {first} | {' | '.join(at)} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
