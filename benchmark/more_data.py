"""With more data DG-PG goes on to get better: at every budget, beside MAPPO and the greedy use of the model in turn.

One rule for all N says how the data of a budget is used. Writes measured/more_data.csv, and prints the table.
"""

import tyro
from runs import Args, head, line, ratios, scenarios, shown, sweep
from yardsticks import in_turn, model

from dgpg import evaluate

SEEDS = (1, 2, 3)
BUDGETS = {5: (10, 40, 160, 640, 1600), 20: (10, 40, 160, 640, 1600), 50: (10, 40, 160, 640, 1600), 200: (640,)}
MANY = "--num-envs 8 --num-steps 100 --num-minibatches 20 --alpha-end 0"
RULE = {10: "", 40: "--num-envs 4", 160: MANY, 640: MANY, 1600: MANY}


def guided(n, budget):
    """DG-PG's jobs at N agents with so many episodes."""
    options = f"--episodes {budget} --eval-every {budget} {RULE[budget]}".strip()
    return [("dgpg.py", n, seed, options) for seed in SEEDS]


def mappo(n, budget):
    """MAPPO's jobs: eight environments, so that 10 episodes are 16. Its rate does not fall: one run has all budgets."""
    most = max(BUDGETS[n])
    short = "--episodes 40 --eval-every 8" if budget <= 40 else f"--episodes {most} --eval-every 160"
    return [("mappo.py", n, seed, short) for seed in SEEDS]


def main(args):
    jobs = [job for n in BUDGETS for budget in BUDGETS[n] for job in guided(n, budget) + mappo(n, budget)]
    found = sweep("more_data", jobs, args)
    head("N", "episodes", "DG-PG", "argmax", "MAPPO", "argmax", "greedy in turn")
    for n in BUDGETS:
        env = scenarios(n)
        greedy = evaluate(env, in_turn(env, model(env))) / evaluate(env, lambda obs: env.heuristic())
        for budget in BUDGETS[n]:
            cells = []
            for group in (guided(n, budget), mappo(n, budget)):
                ends = []  # the runs up to their first evaluation with that many episodes
                for rows in (found[job] for job in group if job in found):
                    ends.append([row for row in rows if row["episodes"] >= budget][:1])
                cells += [shown(ratios(ends)), shown(ratios(ends, argmax=True))]
            line(n, budget, *cells, f"{greedy:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
