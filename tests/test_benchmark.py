"""The benchmarks: statistics by hand, a sweep that goes on, policies against plain loops, rewards against definitions."""

import pathlib

import numpy as np
import pytest
import torch

import analytic_model
import dgpg
from cloud_env import CloudEnv

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def path_to_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The module, with all that it writes in a folder of the test."""
    import runs

    monkeypatch.setattr(runs, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(runs, "ACTORS", tmp_path / "actors")
    return runs


def busy(n_agents, seed, reach=3):
    """An environment some rounds after its start, overloaded."""
    env, rng = CloudEnv(2, n_agents, load=2.0, servers_per_agent=reach), np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    for _ in range(8):
        obs, *_ = env.step(rng.integers(reach, size=(2, n_agents)))
    return env, obs


def test_summaries_by_hand(runs):
    rows = [dict(episodes=k, cost_ratio=ratio) for k, ratio in enumerate((9, 2, 0.9, 1.1, 0.5))]
    assert [runs.first(rows), runs.first(rows, limit=0.6), runs.first(rows[:3], limit=2)] == [2, 4, 1]
    assert np.isnan(runs.first(rows[:2]))
    assert runs.until([80, 160.0, 120], 1600) == "120"
    assert runs.until([80, np.nan, 1200], 1600) == "1,200 (1 of 3 not in 1,600)"
    assert runs.until([80, np.nan, np.nan], 1600) == "never (2 of 3 not in 1,600)"
    assert [runs.shown(values) for values in ([1, 2, 3], [0.5], [])] == ["2.00 ± 2.48", "0.50", "not run"]
    ends = [[{}, {"cost_ratio": 0.75, "argmax": -2.0, "heuristic": -4.0}]]
    assert runs.ratios(ends) == [0.75] and runs.ratios(ends, argmax=True) == [0.5]
    n = np.array([5, 10, 50, 200])
    assert runs.slope(n, 3.0 * n**0.7) == pytest.approx((0.7, 0), abs=1e-7)
    bent = runs.slope(np.array([1, np.e, np.e**2]), np.array([1, np.e, 1]))
    assert bent == pytest.approx((0, (2 / 3 / 1 / 2) ** 0.5))


def test_a_sweep_goes_on_where_it_was(runs, monkeypatch):
    done = []

    def run(*job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return [dict(zip(runs.KEY, job)) | dict.fromkeys(runs.FIGURES, value) | {"peak_mib": 1} for value in (0, 1)]

    monkeypatch.setattr(runs, "run", run)
    jobs = [("dgpg.py", 5, seed, options) for seed in (1, 2) for options in ("", "--load 0.9")]
    with pytest.raises(KeyboardInterrupt):
        runs.sweep("name", jobs, runs.Args(workers=1))
    assert list(runs.sweep("name", jobs, runs.Args(only_show=True))) == jobs[:2]
    done.clear()
    found = runs.sweep("name", jobs[:3] + jobs[:1], runs.Args(workers=1))
    assert done == [jobs[2]] and list(found) == jobs[:3]
    assert [row["return"] for row in found[jobs[1]]] == [0, 1]


def test_a_file_is_known_by_its_content_and_stays_as_it_was(runs, tmp_path):
    folders = [tmp_path / name for name in ("a folder", "b")]
    for k, folder in enumerate(folders):
        folder.mkdir()
        rows = "".join(f"{row},{row % (3 + k) + 1},1,2\n" for row in range(60))
        (folder / "mine.csv").write_text(f"arrival_s,duration_s,cpu,memory_gib\n{rows}")
    (tmp_path / "link.csv").symlink_to(folders[0] / "mine.csv")
    paths = [folders[0] / "mine.csv", folders[1] / "mine.csv", tmp_path / "link.csv"]
    before = [path.read_bytes() for path in paths]
    names = [runs.by_content(path) for path in paths]
    assert names[0] == names[2] != names[1]

    options = f"--rounds 4 --load 3 --episodes 2 --num-envs 1 --eval-every 1 --trace {names[2]}"
    job = ("benchmark/variants.py ippo own-model", 2, 1, options)
    (rows,) = runs.sweep("name", [job], runs.Args()).values()
    assert [path.read_bytes() for path in paths] == before and paths[2].is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"a folder", "b", "link.csv", "measured", "actors"}

    assert [row["episodes"] for row in rows] == [1, 2]  # a row per evaluation
    assert all(row["cost_ratio"] == pytest.approx(row["return"] / row["heuristic"], abs=0.01) for row in rows)
    saved = torch.load(runs.trained(job), weights_only=True)  # kept, not trained anew
    assert saved["system"] == "Rewarded" and "0.weight" in saved["actor"]
    assert list(runs.sweep("name", [job], runs.Args())) == [job]


@pytest.mark.parametrize("seed", range(3))
def test_the_rules_take_the_best_action_of_what_they_see(seed):
    from yardsticks import RULES, in_turn

    env, obs = busy(9, seed)
    assert (in_turn(env, RULES["Best-Fit"](env))(obs) == env.heuristic()).all()

    def distance(x, e):
        return 0.5 * ((x - env.offered_load[env.t, e] / env.capacity.sum(0)) ** 2).sum()

    for name in ("least loaded", "model"):
        decide = RULES[name](env)
        for turns, actions in ((True, in_turn(env, decide)(obs)), (False, decide(obs))):
            for e in range(2):
                x = env.x[e].copy()
                for agent in np.concatenate(env.turns):
                    scores = []
                    for server in env.reach[agent]:
                        z = np.zeros_like(x)
                        z[server] = env.demand[env.t, e, agent] / env.capacity[server]
                        of_model = distance(x + z, e) - distance(x, e) + 0.5 * (z**2).sum()  # g
                        scores.append(of_model if name == "model" else (x + z)[server].max())
                    assert actions[e, agent] == np.argmin(scores), (name, turns, e, agent)
                    if turns:
                        server = env.reach[agent, actions[e, agent]]
                        x[server] += env.demand[env.t, e, agent] / env.capacity[server]


def test_an_actor_in_turn_sees_the_placements_before_its_own(tmp_path):
    from yardsticks import in_turn, learnt

    torch.manual_seed(0)
    actor = dgpg.network(7, 32, output_gain=1.0)
    actor[0].weight.data[:, 2:] = 0  # of the utilisations alone, so that others' placements count
    torch.save({"actor": actor.state_dict()}, tmp_path / "actor.pt")
    env, obs = busy(7, 1)
    decide = learnt(tmp_path / "actor.pt", argmax=True)
    actions = in_turn(env, decide)(obs)
    for e in range(2):
        x = env.x[e].copy()
        for agent in np.concatenate(env.turns):
            row = obs[e, agent].copy()
            row[:, 0:2] = np.log1p(x[env.reach[agent]])
            assert actions[e, agent] == actor(torch.tensor(row)).argmax()
            server = env.reach[agent, actions[e, agent]]
            x[server] += env.demand[env.t, e, agent] / env.capacity[server]
    assert (actions != decide(obs)).any()  # which matters here
    counts = np.zeros((2, 7, 3))
    sampled = learnt(tmp_path / "actor.pt", argmax=False)
    for _ in range(2000):
        counts[np.arange(2)[:, None], np.arange(7), sampled(obs)] += 1
    assert counts / 2000 == pytest.approx(actor(torch.tensor(obs)).softmax(-1).detach().numpy(), abs=0.06)


def test_the_signals_are_what_they_are_called():
    import variants

    args = dgpg.Args(n_agents=6, rounds=3, servers_per_agent=3)
    actions = np.random.default_rng(0).integers(3, size=(3, 2, 6))
    usual, paid = dgpg.cloud(args, 2), {name: variants.rewarded(name)(args, 2) for name in variants.REWARDS}
    for env in (usual, *paid.values()):
        env.reset(seed=5)
    for of_round in actions:
        demand, load = usual.demand[usual.t], usual.offered_load[usual.t]  # of the round that is played
        _, reward, _, _, info = usual.step(of_round)
        rewards = {name: env.step(of_round)[1] for name, env in paid.items()}
        for e in range(2):
            deviation = info["played"]["x"][e] - load[e] / usual.capacity.sum(0)
            d = 0.5 * (deviation**2).sum()
            assert rewards["shared-model"][e] == pytest.approx(-d / 6)
            assert rewards["added-model"][e] == pytest.approx(reward[e] - d / 6)
            for agent, action in enumerate(of_round[e]):
                server = usual.reach[agent, action]
                g = deviation[server] @ (demand[e, agent] / usual.capacity[server])  # ⟨x − x̃, z_i⟩
                assert rewards["own-model"][e, agent] == pytest.approx(-g)
    held_out = variants.rewarded("own-model")(args, 2, held_out=True)
    assert type(held_out) is CloudEnv


def test_an_altered_model_is_told_another_load():
    import variants

    load, capacity = torch.rand(5, 2), torch.rand(4, 2)
    for name, told in (("zero-reference", 0 * load), ("demand-30-percent-low", 0.7 * load)):
        x_ref = variants.altered(name).reference_state(offered_load=load, capacity=capacity)
        assert torch.equal(x_ref, analytic_model.reference_state(told, capacity))
    held = variants.altered("stale-reference").reference_state(offered_load=load, capacity=capacity)
    assert torch.equal(held, analytic_model.reference_state(load[:1].expand(5, 2), capacity))
