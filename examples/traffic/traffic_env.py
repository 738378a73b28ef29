"""Route choice in a city: N dispatchers send a fleet of vehicles over one of K routes each, every round.

The network is Sioux Falls: 24 zones and 76 one-way links, on which a flow of v vehicles/h takes the time
t(v) = t0 (1 + 0.15 (v/c)^4). In every round all dispatchers choose at once and see only the flows that the rounds
before have left: a road that is empty now will not be if all take it. They share one reward. Letters in shapes:
E environments, N agents, K routes, T rounds, L links, J links of the longest route. Flows in vehicles/h, times in min.
"""

import heapq
import json
from pathlib import Path

import numpy as np

from cloud_env import InputError

STAY = 0.5  # the part of a flow that is still on its link one round later
DAY, SWING = 50, 0.25  # rounds from peak to peak, and how far demand rises above its mean


def load_network():
    """Sioux Falls (LeBlanc, Morlok & Pierskalla 1975, Transportation Research 9; the data's source is in the file).

    Returns the links' ends [L, 2], zones from 0, capacity c, free-flow time t0 and usual flow, all [L], the last one of
    the published trips' best known user equilibrium; and these trips [24, 24] from zone to zone.
    """
    content = json.loads(Path(__file__).with_name("sioux_falls.json").read_text())
    links = np.array(content["links"])
    return links[:, :2].astype(int) - 1, *links[:, 2:].T, np.array(content["trips"], dtype=float)


def shortest_routes(ends, free_time, pair, count):
    """The `count` quickest routes without a loop on empty roads, by A*: in order, as lists of link numbers."""
    origin, destination = divmod(pair, 24)
    to_go = np.where(np.arange(24) == destination, 0, np.inf)
    for _ in range(23):  # Bellman and Ford
        np.minimum.at(to_go, ends[:, 0], to_go[ends[:, 1]] + free_time)
    routes, begun = [], [(to_go[origin], 0.0, [origin], [])]
    while len(routes) < count:
        _, spent, zones, links = heapq.heappop(begun)
        if zones[-1] == destination:
            routes.append(links)
            continue
        for link in np.flatnonzero((ends[:, 0] == zones[-1]) & ~np.isin(ends[:, 1], zones)):
            zone, time = ends[link, 1], spent + free_time[link]
            heapq.heappush(begun, (time + to_go[zone], time, [*zones, zone], [*links, link]))
    return routes


class TrafficEnv:
    """`num_envs` cities with N dispatchers each as one. Environment e draws its scenario from seed + e alone.

    load: mean demand as a fraction of the published trips. n_routes: K, the quickest ones of the agent's pair of zones.
    Pairs depend on N alone and spread over the published trips: origins in equal steps, destinations by the golden
    ratio. The city does not grow with N: a fleet is 1/N of its demand. Raises InputError on bad options.
    `constants`: "routes" [N, K, J] links, "on" [N, K, J] false where padded, "pair" [N] 24 x origin + destination,
    "ends", "capacity", "free_time" of the links and "unit" [L] of x.
    """

    def __init__(self, num_envs, n_agents, rounds=100, load=0.8, n_routes=8):
        if not 0 < load < np.inf or min(num_envs, n_agents, rounds) < 1 or not 1 <= n_routes <= 100:
            raise InputError("load must be above 0, n_agents and rounds at least 1, servers_per_agent from 1 to 100")
        self.num_envs, self.n_agents, self.rounds, self.n_routes = num_envs, n_agents, rounds, n_routes
        self.ends, self.capacity, self.free_time, usual, trips = load_network()
        self.usual = load * usual
        origin = np.searchsorted(trips.sum(1).cumsum() / trips.sum(), (np.arange(n_agents) + 0.5) / n_agents)
        among = trips[origin].cumsum(1) / trips[origin].sum(1, keepdims=True)
        pair = 24 * origin + (among > (np.arange(n_agents) * 0.618034 % 1)[:, None]).argmax(1)
        self.fleet_scale = (1 - STAY) * load * trips.sum() / n_agents  # as the flow of a round decays to 0, it adds up
        of_pair = {p: shortest_routes(self.ends, self.free_time, p, n_routes) for p in set(pair.tolist())}
        J = max(len(links) for routes in of_pair.values() for links in routes)
        self.on = np.array([[np.arange(J) < len(links) for links in of_pair[p]] for p in pair])  # [N, K, J]
        self.routes = np.array([[(links + links[:1] * J)[:J] for links in of_pair[p]] for p in pair])
        self.empty_time = self.along(self.free_time[None])[0]  # [N, K] on empty roads
        self.quickest = self.empty_time.min(-1, keepdims=True)
        # ½‖x − x̃‖² = ½ Σ (t0/c)(v − ṽ)²: the curvature of Σ v t(v), but for (v/c)³
        self.unit = np.sqrt(self.capacity / self.free_time * (self.capacity * self.free_time).mean())
        self.constants = dict(routes=self.routes, on=self.on, pair=pair, unit=self.unit, ends=self.ends)
        self.constants |= dict(capacity=self.capacity, free_time=self.free_time)

    def __str__(self):
        return f"{self.num_envs} x {self.rounds} rounds of {self.n_agents} fleets"

    def along(self, per_link):
        """The sum over the links of each route. per_link: [E, L]. Returns [E, N, K]."""
        return np.where(self.on, per_link[:, self.routes], 0).sum(-1)

    def time(self, flow, weight=1, links=slice(None)):
        """t(v) on the links, weight 1, or the marginal cost d/dv v t(v), weight 5."""
        return self.free_time[links] * (1 + 0.15 * weight * (flow / self.capacity[links]) ** 4)

    def added_time(self, flow, agents=slice(None)):
        """What each of these fleets alone would add to the total Σ v t(v) at this flow [E, L]: [E, agents, K]."""
        links = self.routes[agents]
        before = flow[:, links]
        after = before + self.fleet[self.t][:, agents, None, None]
        added = after * self.time(after, links=links) - before * self.time(before, links=links)
        return np.where(self.on[agents], added, 0).sum(-1)

    def reset(self, seed):
        """Draw new scenarios and start their first round. Returns obs [E, N, K, F] float32 and info (see `step`)."""
        rngs = [np.random.default_rng(seed + e) for e in range(self.num_envs)]
        phase = [np.arange(self.rounds + 1) / DAY + rng.random() for rng in rngs]
        sizes = [rng.uniform(0.5, 1.5, (self.rounds + 1, self.n_agents)) for rng in rngs]
        day = 1 + SWING * np.sin(2 * np.pi * np.stack(phase, 1))  # [T + 1, E]
        self.fleet = day[..., None] * np.stack(sizes, 1) * self.fleet_scale  # [T + 1, E, N], the last one is only seen
        self.t = 0
        self.flow = np.zeros((self.num_envs, len(self.ends)))
        self.present = np.zeros((self.num_envs, self.n_agents))  # of each agent's vehicles on the way
        return self._observe()

    def _observe(self, **played):
        size = self.fleet[self.t] / self.fleet_scale  # [E, N]
        alone = self.added_time(STAY * self.flow) / self.fleet[self.t][..., None]
        obs = np.empty((*size.shape, self.n_routes, 7), dtype=np.float32)
        obs[..., 0] = self.empty_time / self.quickest  # detour
        obs[..., 1] = np.log(self.along(self.time(self.flow)) / self.quickest)  # time now
        obs[..., 2] = np.log(self.along(self.time(self.usual, 5)[None]) / self.quickest)  # usual marginal cost
        obs[..., 3] = np.log(alone / self.quickest)  # cost of this fleet alone
        obs[..., 4] = (self.flow / self.capacity)[:, self.routes].max(-1)
        obs[..., 5] = self.empty_time / 20
        obs[..., 6] = size[..., None]
        state = np.concatenate([self.flow / self.capacity, size, self.present / self.fleet_scale], 1)
        return obs, {"state": state.astype(np.float32), "played": played}

    def step(self, actions):
        """Send every fleet over the `actions`-th of its routes. actions: [E, N] integers in [0, K).

        Returns obs [E, N, K, 7]; reward [E], minus the time lost per quickest time on empty roads; terminated [E]
        (never), truncated [E] (after round T) and info: "state" [E, L + 2N], v/c and sizes of the fleets now and of
        what is on the way; "played": "x" [E, L, 1], flow per unit after the joint action, "fleet" [E, N], what each
        adds to its links, and "present" [E, N], its flow on the way.
        """
        E, N, L, fleet = self.num_envs, self.n_agents, len(self.ends), self.fleet[self.t]
        actions = np.asarray(actions)
        if actions.shape != (E, N) or actions.min() < 0 or actions.max() >= self.n_routes:
            raise ValueError(f"actions must be integers [{E}, {N}] from 0 to {self.n_routes - 1}, not {actions}")
        link = self.routes[np.arange(N), actions] + L * np.arange(E)[:, None, None]  # [E, N, J]
        added = np.bincount(link.ravel(), (fleet[..., None] * self.on[np.arange(N), actions]).ravel(), E * L)
        self.flow = STAY * self.flow + added.reshape(E, L)
        self.present = STAY * self.present + fleet
        # 1 − Σ_l v_l t_l(v_l) / Σ_i present_i (quickest time)_i
        reward = 1 - (self.flow * self.time(self.flow)).sum(-1) / (self.present @ self.quickest[:, 0])
        self.t += 1
        obs, info = self._observe(x=(self.flow / self.unit)[..., None], fleet=fleet, present=self.present)
        return obs, reward, np.zeros(E, dtype=bool), np.full(E, self.t == self.rounds), info

    def heuristic(self):
        """In turn: each fleet takes the route that adds least to the total, with all before it known. Returns [E, N]."""
        flow = STAY * self.flow
        actions = np.empty((self.num_envs, self.n_agents), dtype=int)
        for i in range(self.n_agents):
            actions[:, i] = k = self.added_time(flow, [i])[:, 0].argmin(-1)
            links = np.arange(self.num_envs)[:, None], self.routes[i, k]
            np.add.at(flow, links, self.fleet[self.t][:, i, None] * self.on[i, k])
        return actions

    def uncoordinated(self):
        """All at once: each takes the route that will be quickest if the others' departures are as usual."""
        return self.along(self.time(STAY * self.flow + (1 - STAY) * self.usual)).argmin(-1)
