"""examples/traffic and examples/power: scenarios, observations, reference states and policies by hand, and learning."""

import numpy as np
import pytest
import torch

import dgpg
import ippo
import mappo
from cloud_env import InputError
from examples.power import __main__ as power
from examples.power import power_model
from examples.power.power_env import PowerEnv, cost
from examples.traffic import __main__ as traffic
from examples.traffic import traffic_model
from examples.traffic.traffic_env import STAY, TrafficEnv, load_network, shortest_routes
from tests.helpers import play

ENDS, CAPACITY, FREE_TIME, USUAL, TRIPS = load_network()


def time(flow, weight=1):
    """t(v), or with weight 5 the marginal cost d/dv v t(v)."""
    return FREE_TIME * (1 + 0.15 * weight * (flow / CAPACITY) ** 4)


def total_time(flow):
    """Σ v t(v)."""
    return (flow * time(flow)).sum(-1)


def supply(flow):
    """What leaves each zone less what enters it. flow: [..., L]. Returns [..., 24]."""
    return flow @ (np.eye(24)[ENDS[:, 0]] - np.eye(24)[ENDS[:, 1]])


def routes_of(env, agent):
    """The links of each of its routes."""
    return [links[on] for links, on in zip(env.routes[agent], env.on[agent])]


def test_network_and_its_optima_are_the_published_ones():
    assert len(ENDS) == 76 and TRIPS.sum() == 360_600
    assert total_time(USUAL) == pytest.approx(7_480_225.3, abs=1)
    np.testing.assert_allclose(supply(USUAL), TRIPS.sum(1) - TRIPS.sum(0), atol=0.01)
    network = (torch.tensor(part) for part in (TRIPS[None], ENDS, CAPACITY, FREE_TIME))
    (flow,) = traffic_model.assignment(*network, steps=400)
    assert total_time(flow.numpy()) == pytest.approx(7_194_256, rel=1e-3)


@pytest.mark.parametrize("pair", [24 * 0 + 19, 24 * 12 + 1])
def test_routes_are_the_quickest_of_all_without_a_loop(pair):
    routes = shortest_routes(ENDS, FREE_TIME, pair, 8)
    times = [FREE_TIME[links].sum() for links in routes]

    def walks(zones, spent):
        """The times of all that are not slower, once they have come to these zones."""
        if zones[-1] == pair % 24:
            yield spent
            return
        for link in np.flatnonzero(ENDS[:, 0] == zones[-1]):
            if ENDS[link, 1] not in zones and spent + FREE_TIME[link] <= times[-1]:
                yield from walks([*zones, ENDS[link, 1]], spent + FREE_TIME[link])

    assert times == sorted(walks([pair // 24], 0))[:8] and len({tuple(links) for links in routes}) == 8
    for links in routes:
        assert ENDS[links[0], 0] == pair // 24 and ENDS[links[-1], 1] == pair % 24
        assert (ENDS[links[:-1], 1] == ENDS[links[1:], 0]).all()


def test_three_rounds_and_the_observation_by_hand():
    """Half of a round's flow is left a round later; the reward is the time lost by all that are on the way."""
    env, rng, scale = TrafficEnv(2, 9, n_routes=4), np.random.default_rng(0), 0.5 * 0.8 * 360_600 / 9
    env.reset(0)
    flow, at_best, fleet = np.zeros(76), 0.0, env.fleet[:, 1]  # of the second environment
    for t in range(3):
        actions = rng.integers(4, size=(2, 9))
        flow, at_best = flow / 2, at_best / 2
        for i, action in enumerate(actions[1]):
            routes = routes_of(env, i)
            flow[routes[action]] += fleet[t, i]
            at_best += fleet[t, i] * FREE_TIME[routes[0]].sum()
        obs, reward, _, _, info = env.step(actions)
        assert reward[1] == pytest.approx(1 - total_time(flow) / at_best)
    i, k = 4, 2
    links, after = routes_of(env, i)[k], flow / 2
    after[links] += fleet[3, i]
    alone = (total_time(after) - total_time(flow / 2)) / fleet[3, i]
    times = np.array([time(flow)[links].sum(), time(0.8 * USUAL, 5)[links].sum(), alone])
    quickest, empty = FREE_TIME[routes_of(env, i)[0]].sum(), FREE_TIME[links].sum()
    expected = [empty / quickest, *np.log(times / quickest), (flow / CAPACITY)[links].max(), empty / 20]
    np.testing.assert_allclose(obs[1, i, k], [*expected, fleet[3, i] / scale], rtol=1e-4)
    on_the_way = fleet[2] + fleet[1] / 2 + fleet[0] / 4
    expected = np.concatenate([flow / CAPACITY, fleet[3] / scale, on_the_way / scale])
    np.testing.assert_allclose(info["state"][1], expected, rtol=1e-5)


def test_vehicles_and_demand_are_conserved():
    """The flows carry everything on the way from origin to destination; in the long run it is the published demand."""
    env = TrafficEnv(2, 100)
    _, played = play(env, 4)
    demand = np.zeros((2, 24, 24))
    np.add.at(demand, (slice(None), *np.divmod(env.constants["pair"], 24)), env.present)
    np.testing.assert_allclose(supply(env.flow), demand.sum(2) - demand.sum(1), atol=1e-6)
    flow = traffic_model.reference_state(**played).squeeze(-1).numpy() * env.constants["unit"]
    np.testing.assert_allclose(supply(flow), demand.sum(2) - demand.sum(1), atol=1e-3)
    assert env.fleet.sum(-1).mean() / (1 - STAY) == pytest.approx(0.8 * 360_600, rel=0.02)


def test_traffic_policies_choose_as_they_say():
    """Recomputed route by route and link by link: the least total with all before it, the least time as forecast."""
    env = TrafficEnv(2, 30, n_routes=4)
    play(env)
    greedy, at_once = env.heuristic(), env.uncoordinated()
    for e in range(2):
        flow, forecast = env.flow[e] / 2, time(env.flow[e] / 2 + 0.8 * USUAL / 2)
        for i in range(30):
            after = np.repeat(flow[None], 4, 0)
            for k, links in enumerate(routes_of(env, i)):
                after[k, links] += env.fleet[env.t][e, i]
            assert greedy[e, i] == total_time(after).argmin()
            assert at_once[e, i] == np.argmin([forecast[links].sum() for links in routes_of(env, i)])
            flow = after[greedy[e, i]]
    assert (greedy != at_once).any()


def test_the_valley_by_hand():
    # 3 over slots 0 and 1 at 1 and 2: level (3 + 1 + 2)/2 = 3, below slot 2; the second row weighs double
    base, energy = torch.tensor([[[5.0, 2, 1], [0, 0, 9]]]), torch.tensor([[3.0, 1]])
    x = power_model.reference_state(base, energy, torch.tensor([1.0, 2]))
    torch.testing.assert_close(x.flatten(), torch.tensor([5.0, 3, 3, 1, 1, 18]))


def test_a_night_pays_its_cost_and_conserves_its_energy():
    """After every round of it, and after the first of the next one. The valley holds in each row what the load does."""
    flat = np.full((1, 3, 24), 0.5)
    flat[0, 0, :12], flat[0, 1, 3] = 0.7, 1.2  # Σ(x − x̄)² = 24·0.1²; overload 10·0.2²/2
    np.testing.assert_allclose(cost(flat), [0.24 + 0.2])
    env, paid = PowerEnv(2, 13, 10), 0
    G = len(env.rating) - 1
    weight = np.array([G**0.5] + [1] * G)  # in d the feeder counts as much as all transformers
    for before in range(6):
        reward, played = play(env, before)
        both = played["x"], power_model.reference_state(**played)
        load, reference = (v.view(2, -1, 24).numpy() / weight[:, None] for v in both)
        np.testing.assert_allclose(load.sum(-1), reference.sum(-1), rtol=0, atol=1e-9)
        np.testing.assert_allclose(load[:, 0], (load[:, 1:] * env.rating[1:, None]).sum(1) / env.rating[0])
        paid = reward if before == 5 else paid + reward
        np.testing.assert_allclose(paid, -cost(load))
    env = PowerEnv(1, 13, 1000)
    env.reset(0)
    night = 5 * 13 * (env.power * env.length).mean()  # kW slots
    assert night == pytest.approx(0.8 * 0.4 * 24 * env.rating[0], rel=0.02)  # 0.8 of what the valley holds


def test_observation_of_plans_by_hand():
    env = PowerEnv(2, 13, 10, n_plans=4)
    play(env, 1)
    obs, info = env._observe()
    e, i, k, t = 1, 8, 2, env.t
    length, row = env.length[t, e, i], 1 + env.transformer[i]
    start = round((24 - length) * k / 3)
    loads = env.load[e, [0, row], start : start + length]
    group = env.transformer == env.transformer[i]
    position = (group[:i].sum() + 0.5) / group.sum()
    power = 10 * env.power[t, e, i] / env.rating[row]
    expected = [*loads.mean(1), *loads.max(1), power, length / 8, 2 / 3, 2 / 3 - position, t / 5]
    np.testing.assert_allclose(obs[e, i, k], expected, rtol=1e-5)
    parts = env.load[e].ravel(), 10 * env.power[t, e] / env.rating[1 + env.transformer], env.length[t, e] / 8, [t / 5]
    np.testing.assert_allclose(info["state"][e], np.concatenate(parts), rtol=1e-5)


def test_power_policies_add_least_to_what_they_see():
    """Uncoordinated: to the load at the round's start. In turn: with all plans before it."""
    env = PowerEnv(2, 13, 10, load=2.0)
    play(env)
    at_once, in_turn = env.uncoordinated(), env.heuristic()
    for e in range(2):
        load = env.load[e].copy()
        for i in range(13):
            profiles = env.on[e, i] * env.power[env.t, e, i]  # [K, H]
            added = profiles[:, None] * (env.member[:, i] / env.rating)[:, None]  # [K, 1 + G, H]
            assert at_once[e, i] == cost(env.load[e] + added).argmin()
            assert in_turn[e, i] == cost(load + added).argmin()
            load += added[in_turn[e, i]]
    assert (at_once != in_turn).any()


@pytest.mark.parametrize("args, make_env", [(dgpg.Args, dgpg.cloud), *((s.Args, s.make_env) for s in (traffic, power))])
def test_bad_options_and_actions_are_refused(args, make_env):
    for name, value in dict(load=0, rounds=0, n_agents=0, servers_per_agent=0, trace="no trace").items():
        with pytest.raises((InputError, OSError), match=name):
            make_env(args(**{name: value}), 1)
    with pytest.raises(InputError, match="at least 1"):
        make_env(args(), 0)
    env = make_env(args(n_agents=3, servers_per_agent=3), 1)
    env.reset(seed=0)
    for actions in ([[0, 0]], [[0, 3, 0]], [[-1, 0, 0]]):
        with pytest.raises(ValueError, match="actions must be integers"):
            env.step(np.array(actions))


@pytest.mark.parametrize(
    "system, model, options, bar",
    [
        (traffic, traffic_model, dict(n_agents=30, rounds=10, episodes=4), 10),
        (power, power_model, dict(n_agents=12, rounds=10, episodes=6, num_envs=1, eval_every=6), 2.6),
    ],
)
def test_dgpg_learns_what_random_untrained_and_unguided_agents_miss(system, model, options, bar):
    guided = dgpg.train(system.Args(**options), system.make_env, model)
    assert guided["cost_ratio"] < bar < guided["random"] / guided["heuristic"]
    for changed in (dict(episodes=0), dict(alpha_start=0, alpha_end=0)):
        assert dgpg.train(system.Args(**options | changed), system.make_env, model)["cost_ratio"] > bar
    for baseline in (mappo, ippo):  # they run on any system, too
        baseline.train(baseline.Args(n_agents=3, rounds=10, episodes=1, num_envs=1), system.make_env)
