"""How the benchmarks read a curve."""

import pathlib

import numpy as np
import pytest

from cloud_env import CloudEnv

ROOT = pathlib.Path(__file__).parent.parent


def test_summaries_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    runs = pytest.importorskip("runs")
    episodes = np.array([1, 2, 3, 4, 5])
    assert runs.reached(episodes, np.array([2, 0.9, 1.1, 1.0, 0.8])) == 4  # the dip at 2 did not last
    assert runs.reached(episodes, np.array([2, 0.9, 1.1, 1.0, 0.8]), stays=False) == 2
    assert runs.reached(episodes, np.array([0.5, 0.9, 0.9, 0.9, 0.9])) == 1
    assert np.isnan(runs.reached(episodes, np.array([2, 0.9, 0.9, 0.9, 1.1])))
    assert runs.interval([1, 2, 3]) == pytest.approx((2, 4.30 / 3**0.5))
    assert [runs.shown(values) for values in ([1, 2, 3], [0.5])] == ["2.00 ± 2.48", "0.50"]
    assert runs.listed([80, np.nan, 160.0]) == "80, never, 160"
    assert runs.counted([160, np.nan, 80, 80.0, np.nan]) == "80 (2), 160, never (2)"
    n = np.array([5, 10, 50, 200])
    assert runs.slope(n, 3.0 * n**0.7) == pytest.approx((0.7, 0), abs=1e-7)
    assert runs.slope(np.array([1, np.e, np.e**2]), np.array([1, np.e, 1])) == pytest.approx(
        (0, (2 / 3 / 1 / 2) ** 0.5)
    )


def test_a_sweep_goes_on_where_it_was(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    runs = pytest.importorskip("runs")
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    done = []

    def run(script, n_agents, seed, options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(seed)
        row = dict.fromkeys(runs.FIELDS, 0) | dict(script=script, n_agents=n_agents, seed=seed, options=options)
        return [{**row, "episode": 5, "cost_ratio": 2}, {**row, "episode": 10, "cost_ratio": 1}]

    monkeypatch.setattr(runs, "run", run)
    jobs = [("dgpg.py", 5, seed, "--load 0.9") for seed in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        runs.sweep("name", jobs, 1)
    done.clear()
    assert len(runs.sweep("name", jobs, 1)) == 6 and done == [3]
    (curves,) = runs.curves(runs.sweep("name", jobs, 1)).values()
    assert curves.keys() == {1, 2, 3} and curves[3].tolist() == [[5, 10], [2, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_the_yardsticks_take_the_best_action_of_what_they_see(monkeypatch, seed):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    policies = pytest.importorskip("yardsticks").POLICIES
    env, rng = CloudEnv(2, 9, load=2.0, servers_per_agent=3), np.random.default_rng(seed)
    env.reset(seed=seed)
    for _ in range(8):
        env.step(rng.integers(3, size=(2, 9)))

    def distance(x, e):
        return 0.5 * ((x - env.offered_load[env.t, e] / env.capacity.sum(0)) ** 2).sum()

    names = ("least loaded, in turn", "greedy on the model, in turn", "greedy on the model, all at once")
    for name in names:
        actions = policies[name](env, None)
        for e in range(2):
            x = env.x[e].copy()
            for agent in np.concatenate(env.turns):
                scores = []
                for server in env.reach[agent]:
                    z = np.zeros_like(x)
                    z[server] = env.demand[env.t, e, agent] / env.capacity[server]
                    if name.startswith("least"):
                        scores.append((x + z)[server].max())
                    else:  # g = d(x + z) − d(x) + ½‖z‖²
                        scores.append(distance(x + z, e) - distance(x, e) + 0.5 * (z**2).sum())
                assert actions[e, agent] == np.argmin(scores), (name, e, agent)
                if name.endswith("in turn"):
                    server = env.reach[agent, actions[e, agent]]
                    x[server] += env.demand[env.t, e, agent] / env.capacity[server]
