"""The benchmarks: statistics by hand, a sweep that goes on, policies against plain loops, noise of the gradients."""

import itertools

import numpy as np
import pytest
import runs
import systems
import torch
import variance
import variants
from yardsticks import RULES, in_turn, learnt

import analytic_model
import dgpg
from cloud_env import CloudEnv
from tests.helpers import play, write_trace


@pytest.fixture(autouse=True)
def written_in_a_folder_of_the_test(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(runs, "ACTORS", tmp_path / "actors")


def test_summaries_by_hand():
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


def test_a_sweep_goes_on_where_it_was(monkeypatch):
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
    found = runs.sweep("name", jobs[:3] + jobs[2:3], runs.Args(workers=1))
    assert done == [jobs[2]] and list(found) == jobs[:3]
    assert [row["return"] for row in found[jobs[1]]] == [0, 1]
    assert len(runs.read(runs.MEASURED / "name.csv")) == 3 * 2


@pytest.mark.parametrize("n", [60, 130])
def test_policies_are_measured_on_as_many_scenarios_as_runs(n):
    made = []

    def make_env(args, num_envs, held_out=False):
        made.append((num_envs, held_out))
        return dgpg.cloud(args, num_envs, held_out)

    dgpg.train(dgpg.Args(n_agents=n, rounds=2, episodes=0), make_env)
    for env in (runs.scenarios(n, rounds=2), systems.environment("traffic", n), systems.environment("power", n)):
        assert made == [(1, False), (len(env.reset(seed=0)[0]), True)]


def test_a_file_is_known_by_its_content_and_a_job_keeps_rows_and_actor(tmp_path):
    (tmp_path / "a folder").mkdir()
    paths = [tmp_path / "a folder/mine.csv", tmp_path / "other.csv", tmp_path / "link.csv"]
    for k, path in enumerate(paths[:2]):
        write_trace(path, [(row, row % (3 + k) + 1, 1, 2) for row in range(60)])
    paths[2].symlink_to(paths[0])
    names = [runs.by_content(path) for path in paths]
    assert names[0] == names[2] != names[1]
    options = f"--rounds 4 --load 3 --episodes 2 --num-envs 1 --eval-every 1 --trace {names[0]}"
    job = ("benchmark/variants.py ippo own-model", 2, 7, options)
    (rows,) = runs.sweep("name", [job], runs.Args()).values()
    assert [row["episodes"] for row in rows] == [1, 2]  # a row per evaluation
    assert all(row["cost_ratio"] == pytest.approx(row["return"] / row["heuristic"], abs=0.01) for row in rows)
    saved = torch.load(runs.trained(job), weights_only=True)  # kept, not trained anew
    assert saved["system"] == "Rewarded" and saved["args"]["seed"] == 7 and "0.weight" in saved["actor"]
    assert list(runs.sweep("name", [job], runs.Args())) == [job]


@pytest.mark.parametrize("seed", range(3))
def test_rules_and_actors_in_turn_take_the_best_action_of_what_they_see(seed):
    torch.manual_seed(seed)
    actor = dgpg.network(7, 32, output_gain=1.0)
    actor[0].weight.data[:, 2:] = 0  # of the utilisations alone, so that others' placements count
    torch.save({"actor": actor.state_dict()}, "actor.pt")
    env = CloudEnv(2, 9, load=2.0, servers_per_agent=3)
    play(env, 7, seed=seed)
    obs, _ = env._observe()
    deciders = {name: rule(env) for name, rule in RULES.items()} | {"actor": learnt("actor.pt", argmax=True)}
    actions = {name: in_turn(env, decide)(obs) for name, decide in deciders.items()}
    assert (actions["Best-Fit"] == env.heuristic()).all()
    for name, e in itertools.product(("least loaded", "model", "actor"), range(2)):
        x = env.x[e].copy()
        for agent in np.concatenate(env.turns):
            near, action = env.reach[agent], actions[name][e, agent]
            z = env.demand[env.t, e, agent] / env.capacity[near]  # [K, 2]
            g = ((x[near] + z - env.offered_load[env.t, e] / env.capacity.sum(0)) * z).sum(-1)
            features = np.concatenate([np.log1p(x[near]), obs[e, agent, :, 2:]], 1, dtype=np.float32)
            scores = {"least loaded": (x[near] + z).max(-1), "model": g, "actor": -actor(torch.tensor(features))}
            assert action == scores[name].argmin(), name
            x[near[action]] += z[action]
    assert (actions["actor"] != deciders["actor"](obs)).any()  # to be in turn matters here
    sampled = learnt("actor.pt", argmax=False)
    shares = np.mean([np.eye(3)[sampled(obs)] for _ in range(2000)], 0)
    assert shares == pytest.approx(actor(torch.tensor(obs)).softmax(-1).detach().numpy(), abs=0.06)


def test_the_signals_are_what_they_are_called():
    args, rng = dgpg.Args(n_agents=6, rounds=3, load=5.0, servers_per_agent=3), np.random.default_rng(0)
    usual, paid = dgpg.cloud(args, 2), {name: variants.rewarded(name)(args, 2) for name in variants.REWARDS}
    for env in (usual, *paid.values()):
        env.reset(seed=5)
    for t in range(3):
        actions = rng.integers(3, size=(2, 6))
        _, reward, _, _, info = usual.step(actions)
        rewards = {name: env.step(actions)[1] for name, env in paid.items()}
        deviation = info["played"]["x"] - (usual.offered_load[t] / usual.capacity.sum(0))[:, None]
        d = 0.5 * (deviation**2).sum((1, 2))
        np.testing.assert_allclose(rewards["shared-model"], -d / 6)
        np.testing.assert_allclose(rewards["added-model"], reward - d / 6)
        server = usual.reach[np.arange(6), actions]
        g = (deviation[[[0], [1]], server] * usual.demand[t] / usual.capacity[server]).sum(-1)  # ⟨x − x̃, z_i⟩
        np.testing.assert_allclose(rewards["own-model"], -g)
    assert type(variants.rewarded("own-model")(args, 2, held_out=True)) is CloudEnv


def test_an_altered_model_is_told_another_load():
    load, capacity = torch.rand(12, 2), torch.rand(4, 2)
    told = {"zero-reference": 0 * load, "stale-reference": load[[0] * 5 + [5] * 5 + [10] * 2]}
    told |= {"demand-30-percent-low": 0.7 * load, "demand-30-percent-high": 1.3 * load}
    for name, known in told.items():
        x_ref = variants.altered(name).reference_state(offered_load=load, capacity=capacity)
        assert torch.equal(x_ref, analytic_model.reference_state(known, capacity))


def test_noise_of_the_return_grows_with_n_and_of_the_guidance_does_not():
    sizes = (12, 36, 96)
    rows = [variance.measure(n, scenarios=2, samples=64, rounds=20, alpha=0.5) for n in sizes]
    slopes = {name: runs.slope(np.array(sizes), np.array([row[name] for row in rows]))[0] for name in rows[0]}
    assert 0.75 < slopes["return_variance"] < 1.25
    assert 0.6 < slopes["return_noise"] < 1.5
    assert slopes["mixture_variance"] > 0.6  # at a fixed α the return's noise is still there
    for name in ("guidance_variance", "guidance_noise", "expectation_variance", "optimum_variance"):
        assert abs(slopes[name]) < 0.3, name
    for row in rows:
        assert row["alpha_star"] == pytest.approx(row["alpha_measured"], abs=0.1)
        assert row["expectation_variance"] < 0.9 * row["guidance_variance"]
