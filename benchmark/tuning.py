"""The baselines' batch (environments x rounds), learning rate and entropy bonus at N = 5, 10 and 20; IPPO's also at 50.

Writes results/tuning.csv (a run that is there is not repeated), and prints the table: first at Best-Fit, cost ratio.
"""

import tyro
from runs import RESULTS, Args, curves, head, listed, reached, read, sweep

RUN = "--eval-every 160"
OWN = "--no-share-parameters --learning-rate 1e-3 --ent-coef 0"
FASTER = "--learning-rate 1e-2"
SHARED_BATCHES = [FASTER, "", f"{FASTER} --num-envs 2", "--num-envs 2", f"{FASTER} --num-envs 4"]
SHARED_BATCHES += [f"{FASTER} --num-steps 50", f"{FASTER} --num-steps 25", f"{FASTER} --ent-coef 0"]
OWN_BATCHES = [OWN, f"{OWN} --num-envs 2", f"{OWN} --num-steps 50", OWN.replace("1e-3", "3e-3")]
OWN_10 = "--no-share-parameters --ent-coef 0"
RATES = [f"--learning-rate {rate} --ent-coef {bonus}" for rate in ("1e-3", "3e-3", "1e-2") for bonus in ("0", "0.01")]
PLAN = [  # script, N, episodes, changes, seeds
    *(("mappo.py", n, 1600, SHARED_BATCHES, (1,)) for n in (5, 10)),
    ("mappo.py", 5, 1600, OWN_BATCHES, (1,)),
    *(("mappo.py", n, 1600, SHARED_BATCHES, (2,)) for n in (5, 10)),
    ("mappo.py", 20, 1600, SHARED_BATCHES[:4] + ["--num-steps 50", "--num-steps 25"], (1,)),
    ("mappo.py", 10, 1600, [OWN_10, f"{OWN_10} --num-envs 2", f"{OWN_10} --num-steps 50"], (1,)),
    *(("ippo.py", n, 1600, RATES, (1,)) for n in (20, 50)),
    *(("ippo.py", n, 1600, RATES[-2:], (2, 3)) for n in (20, 50)),  # one seed leaves the two close
]


def main(args):
    jobs = [
        (script, n, seed, f"--episodes {episodes} {RUN} {change}".strip())
        for script, n, episodes, changes, seeds in PLAN
        for change in changes
        for seed in seeds
    ]
    rows = read(RESULTS / "tuning.csv") if args.only_show else sweep("tuning", jobs, args.workers)
    found = curves(rows)
    head(
        "", "N", "changes", "first at Best-Fit", "cost ratio after 480 episodes", "800", "at the end", "argmax", "after"
    )
    for script, n, options in sorted(dict.fromkeys((script, n, options) for script, n, _, options in jobs)):
        seeds = sorted(found.get((script, n, options), {}).items())
        first = listed(reached(*curve, stays=False) for _, curve in seeds)
        at = [", ".join(f"{ratios[episodes == k][0]:.2f}" for _, (episodes, ratios) in seeds) for k in (480, 800)]
        at.append(", ".join(f"{ratios[-1]:.2f}" for _, (_, ratios) in seeds))
        last = {
            row["seed"]: row["argmax"] / row["best_fit"]
            for row in rows
            if row["options"] == options and row["script"] == script and row["n_agents"] == n
        }
        at.append(", ".join(f"{last[seed]:.2f}" for seed in sorted(last)))
        name, episodes = script.removesuffix(".py").upper(), options.split()[1]
        change = options.partition(RUN)[2].strip() or "none"
        print(f"| {name} | {n} | `{change}` | {first} | {' | '.join(at)} | {episodes} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
