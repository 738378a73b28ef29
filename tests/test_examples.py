"""examples/traffic and examples/power: scenarios, observations, reference states and policies by hand, and learning."""

import numpy as np
import pytest
import torch

import dgpg
from cloud_env import InputError
from examples.power import __main__ as power
from examples.power import power_model
from examples.power.power_env import PowerEnv, cost
from examples.traffic import __main__ as traffic
from examples.traffic import traffic_model
from examples.traffic.traffic_env import STAY, TrafficEnv, load_network, shortest_routes
from tests.helpers import play, random_actions

ENDS, CAPACITY, FREE_TIME, USUAL, TRIPS = load_network()


def time(flow, weight=1):
    """t(v), or with weight 5 the marginal cost d/dv v t(v)."""
    return FREE_TIME * (1 + 0.15 * weight * (flow / CAPACITY) ** 4)


def total_time(flow):
    """Σ v t(v), from the definition."""
    return (flow * time(flow)).sum(-1)


def supply(flow):
    """What leaves each zone less what enters it. flow: [..., L]. Returns [..., 24]."""
    return flow @ (np.eye(24)[ENDS[:, 0]] - np.eye(24)[ENDS[:, 1]])


def test_network_is_the_published_one():
    """Its equilibrium's total time is the best known one, and its flows carry the published trips."""
    assert len(ENDS) == 76 and TRIPS.sum() == 360_600
    assert total_time(USUAL) == pytest.approx(7_480_225.3, abs=1)
    np.testing.assert_allclose(supply(USUAL), TRIPS.sum(1) - TRIPS.sum(0), atol=0.01)


@pytest.mark.parametrize("pair", [24 * 0 + 19, 24 * 12 + 1])
def test_routes_are_the_quickest_of_all_without_a_loop(pair):
    routes = shortest_routes(ENDS, FREE_TIME, pair, 8)
    times, every = [FREE_TIME[links].sum() for links in routes], []

    def walk(zones, spent):
        if zones[-1] == pair % 24:
            every.append(spent)
            return
        for link in np.flatnonzero(ENDS[:, 0] == zones[-1]):
            if ENDS[link, 1] not in zones and spent + FREE_TIME[link] <= times[-1]:
                walk([*zones, ENDS[link, 1]], spent + FREE_TIME[link])

    walk([pair // 24], 0)
    assert times == sorted(every)[:8] and len({tuple(links) for links in routes}) == 8
    for links in routes:
        assert ENDS[links[0], 0] == pair // 24 and ENDS[links[-1], 1] == pair % 24
        assert (ENDS[links[:-1], 1] == ENDS[links[1:], 0]).all()


def test_three_rounds_by_hand():
    """Half of a round's flow is left a round later; the reward is the time lost by all that are on the way."""
    env, rng = TrafficEnv(1, 5, n_routes=4), np.random.default_rng(0)
    obs, _ = env.reset(0)
    routes = [[links[on] for links, on in zip(*of_agent)] for of_agent in zip(env.routes, env.on)]
    flow, at_best = np.zeros(76), 0.0
    for t in range(3):
        actions = random_actions(obs, rng)
        flow, at_best = flow / 2, at_best / 2
        for i, action in enumerate(actions[0]):
            flow[routes[i][action]] += env.fleet[t, 0, i]
            at_best += env.fleet[t, 0, i] * FREE_TIME[routes[i][0]].sum()
        obs, reward, _, _, _ = env.step(actions)
        np.testing.assert_allclose(reward, 1 - total_time(flow) / at_best)


def test_observation_of_routes_by_hand():
    env = TrafficEnv(2, 9, n_routes=4)
    play(env)
    obs, info = env._observe()
    e, i, k = 1, 4, 2
    links, fleet, scale = env.routes[i, k][env.on[i, k]], env.fleet[env.t, e, i], 0.5 * 0.8 * 360_600 / 9
    quickest, empty = FREE_TIME[env.routes[i, 0][env.on[i, 0]]].sum(), FREE_TIME[links].sum()
    after = env.flow[e] / 2
    after[links] += fleet
    alone = (total_time(after) - total_time(env.flow[e] / 2)) / fleet
    times = np.array([time(env.flow[e])[links].sum(), time(0.8 * USUAL, 5)[links].sum(), alone])
    largest = (env.flow[e] / CAPACITY)[links].max()
    expected = [empty / quickest, *np.log(times / quickest), largest, empty / 20, fleet / scale]
    np.testing.assert_allclose(obs[e, i, k], expected, rtol=1e-4)
    on_the_way = env.fleet[2, e] + env.fleet[1, e] / 2 + env.fleet[0, e] / 4
    expected = np.concatenate([env.flow[e] / CAPACITY, env.fleet[env.t, e] / scale, on_the_way / scale])
    np.testing.assert_allclose(info["state"][e], expected, rtol=1e-5)


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
            routes = [links[on] for links, on in zip(env.routes[i], env.on[i])]
            after = np.repeat(flow[None], 4, 0)
            for k, links in enumerate(routes):
                after[k, links] += env.fleet[env.t][e, i]
            assert greedy[e, i] == total_time(after).argmin()
            assert at_once[e, i] == np.argmin([forecast[links].sum() for links in routes])
            flow = after[greedy[e, i]]
    assert (greedy != at_once).any()


def test_the_system_optimum_is_the_published_one():
    network = (torch.tensor(part) for part in (TRIPS[None], ENDS, CAPACITY, FREE_TIME))
    (flow,) = traffic_model.assignment(*network, steps=400)
    assert total_time(flow.numpy()) == pytest.approx(7_194_256, rel=1e-3)


def test_the_valley_by_hand():
    # 3 over slots 0 and 1 at 1 and 2: level (3 + 1 + 2)/2 = 3, below slot 2; the second row weighs double
    base, energy = torch.tensor([[[5.0, 2, 1], [0, 0, 9]]]), torch.tensor([[3.0, 1]])
    x = power_model.reference_state(base, energy, torch.tensor([1.0, 2]))
    torch.testing.assert_close(x.flatten(), torch.tensor([5.0, 3, 3, 1, 1, 18]))


@pytest.mark.parametrize("before", [0, 4, 5])
def test_energy_is_conserved(before):
    """The load and the valley hold the same energy in every row, also after a night has ended."""
    env = PowerEnv(2, 13, 10)
    _, played = play(env, before)
    both = played["x"], power_model.reference_state(**played)
    load, reference = (v.view(2, -1, 24).numpy() / env.weight[:, None] for v in both)
    np.testing.assert_allclose(load.sum(-1), reference.sum(-1), rtol=0, atol=1e-9)
    np.testing.assert_allclose(load[:, 0], (load[:, 1:] * env.rating[1:, None]).sum(1) / env.rating[0])
    env = PowerEnv(1, 13, 1000)
    env.reset(0)
    night = 5 * 13 * (env.power * env.length).mean()  # kW slots
    assert night == pytest.approx(0.8 * 0.4 * 24 * env.rating[0], rel=0.02)  # 0.8 of what the valley holds


def test_a_night_pays_its_cost():
    load = np.full((1, 3, 24), 0.5)
    load[0, 0, :12], load[0, 1, 3] = 0.7, 1.2  # Σ(x − x̄)² = 24·0.1²; overload 10·0.2²/2
    np.testing.assert_allclose(cost(load), [0.24 + 0.2])
    env = PowerEnv(2, 13, 10)
    rewards, rounds = zip(*(play(env, before) for before in range(5)))
    last = rounds[-1]["x"].reshape(2, -1, 24).numpy() / env.weight[:, None]
    np.testing.assert_allclose(sum(rewards), -cost(last))


def test_observation_of_plans_by_hand():
    """Of one agent's plans, slot by slot; the critic sees all loads; agents of a group see other distances."""
    env = PowerEnv(2, 13, 10, n_plans=4)
    play(env, 1)
    obs, info = env._observe()
    e, i, k, t = 1, 8, 2, env.t
    length, row = env.length[t, e, i], 1 + env.transformer[i]
    start = round((24 - length) * k / 3)
    loads = env.load[e, [0, row], start : start + length]
    size = (env.transformer == env.transformer[i]).sum()
    place = (env.transformer[:i] == env.transformer[i]).sum()
    power = 10 * env.power[t, e, i] / env.rating[row]
    expected = [*loads.mean(1), *loads.max(1), power, length / 8, 2 / 3, 2 / 3 - (place + 0.5) / size, t / 5]
    np.testing.assert_allclose(obs[e, i, k], expected, rtol=1e-5)
    parts = env.load[e].ravel(), 10 * env.power[t, e] / env.rating[1 + env.transformer], env.length[t, e] / 8, [t / 5]
    np.testing.assert_allclose(info["state"][e], np.concatenate(parts), rtol=1e-5)


def test_power_policies_add_least_to_what_they_see():
    """Uncoordinated: to the load at the round's start. In turn: with all plans before it."""
    env = PowerEnv(2, 13, 10, load=2.0)
    play(env)
    at_once, in_turn = env.uncoordinated(), env.heuristic()
    load = env.load.copy()

    def cheapest(load, added):
        return cost((load[:, None] + added).reshape(-1, *load.shape[1:])).reshape(2, -1).argmin(1)

    for i in range(13):
        profiles = env.on[:, i] * env.power[env.t][:, i, None, None]  # [E, K, H]
        added = profiles[:, :, None] * (env.member[:, i] / env.rating)[:, None]  # [E, K, 1 + G, H]
        assert (cheapest(env.load, added) == at_once[:, i]).all()
        assert (cheapest(load, added) == in_turn[:, i]).all()
        load += added[[0, 1], in_turn[:, i]]
    assert (at_once != in_turn).any()


@pytest.mark.parametrize("system", [traffic, power])
def test_bad_options_and_actions_are_refused(system):
    for options in (dict(load=0), dict(rounds=0), dict(n_agents=0), dict(servers_per_agent=0), dict(trace="file.csv")):
        with pytest.raises(InputError, match=next(iter(options))):
            system.make_env(system.Args(**options), 1)
    env = system.make_env(system.Args(n_agents=3, servers_per_agent=4), 1)
    env.reset(seed=0)
    for actions in ([[0, 0]], [[0, 4, 0]], [[-1, 0, 0]]):
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
