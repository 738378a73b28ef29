"""With more data DG-PG goes on to get better: at every budget, beside MAPPO and the greedy use of the model in turn.

One rule for all N says how the data of a budget is used; "g alone" is the same without the return. Writes
measured/more_data.csv, and prints the table.
"""

import tyro
from runs import Args, head, line, ratios, scenarios, shown, sweep
from scaling import baseline
from yardsticks import in_turn, model

from dgpg import evaluate

SEEDS = (1, 2, 3)
# chosen on seeds 11 and 12: at N = 5 and 20 after 160 episodes; at N = 20 and 50 after 640; at N = 5 after 1,600
MORE = "--num-envs 8 --alpha-end 0"
MOST = f"{MORE} --num-steps 100 --num-minibatches 20"
LAST = f"{MOST} --alpha-start 0.2 --learning-rate 5e-3"
ALONE = "--alpha-start 1 --alpha-end 1"  # g alone, without the return; of an option that stands twice the last counts
RULE = {10: "", 40: MORE, 160: MORE, 640: MOST, 1600: LAST}  # options after so many episodes
BUDGETS = dict.fromkeys((5, 20, 50), tuple(RULE)) | {200: (640,)}  # episodes at each N
CHANGES = dict.fromkeys((5, 20, 50), ("", ALONE)) | {200: ("",)}


def guided(n, budget, change=""):
    """DG-PG's jobs at N agents with so many episodes, and a change of the rule's options."""
    options = " ".join(f"--episodes {budget} --eval-every {budget} {RULE[budget]} {change}".split())
    return [("dgpg.py", n, seed, options) for seed in SEEDS]


def mappo(n):
    """MAPPO's jobs at N agents. Its rate does not fall, so that one run has all budgets, from 40 on."""
    return baseline("mappo.py", n)[: len(SEEDS)]


def main(args):
    jobs = [guided(n, budget, change) for n in BUDGETS for change in CHANGES[n] for budget in BUDGETS[n]]
    found = sweep("more_data", sum(jobs, []), args)
    found |= sweep("scaling", [job for n in BUDGETS for job in mappo(n)], args)
    head("cost ratio after so many episodes", *(f"{budget:,}" for budget in RULE), "greedy in turn")
    for n in BUDGETS:
        env = scenarios(n)
        greedy = evaluate(env, in_turn(env, model(env))) / evaluate(env, lambda obs: env.heuristic())
        for change in CHANGES[n]:
            name = "DG-PG, g alone" if change else "DG-PG"
            runs = [[found[job] for job in guided(n, budget, change) if job in found] for budget in RULE]
            line(f"{name}, N = {n}", *(shown(ratios(there)) for there in runs), f"{greedy:.2f}")
            ends = [ratios(there, argmax=True) for there in runs]
            line(f"{name}, argmax, N = {n}", *map(shown, ends), f"{greedy:.2f}")
        of_mappo = [found[job] for job in mappo(n) if job in found]
        at = [[row["cost_ratio"] for rows in of_mappo for row in rows if row["episodes"] == budget] for budget in RULE]
        line(f"MAPPO, N = {n}", *map(shown, at), f"{greedy:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
