"""Electric cars in the valley of the night: N aggregators book charging plans, every round, and share one reward.

Before each night cars are announced in waves, one car per aggregator and wave (= round). A plan is a start slot: the
car then charges without a break. Its load falls on the whole feeder and on its aggregator's transformer. All agents
choose at once and see only what is booked so far. After its last wave a night is settled and the next one starts with
its own base load. Letters in shapes: E environments, N agents, K plans, T rounds, H slots, G transformers; axes of
size 1 + G are rows: the feeder, then the transformers. Loads are in units of the row's rating.
"""

import math

import numpy as np

from cloud_env import InputError

WAVES, SLOTS = 5, 24  # rounds of a night, and its slots: half hours from 19:00 to 7:00
POWER = np.array([3.7, 7.4, 11.0, 22.0])  # kW, usual wallboxes, at load 0.8 and N > 6
LENGTH = np.arange(2, 9)  # slots that a car charges
RATING = 36.0  # kVA of transformer per aggregator, times 0.8 to 1.2
GROUP = 6  # aggregators per transformer: one car is 1/N of the feeder's load, but not of its transformer's
BASE = 0.6  # mean base load; the valley holds 1 - BASE in each slot
OVERLOAD = 10.0  # weight of transformer overload in the cost


def draw_scenario(rng, rounds, n_agents, rating):
    """An episode's base load [nights, 1 + G, H] per rating, and cars: power [T + 1, N] kW and length [T + 1, N] slots.

    Base loads are level + depth cos(2π h/H + phase), other ones each night and on each transformer.
    """
    nights, G = rounds // WAVES + 1, len(rating) - 1
    phase = rng.uniform(-0.6, 0.6, (nights, 1, 1)) + rng.uniform(-0.3, 0.3, (nights, G, 1))
    depth = rng.uniform(0.15, 0.3, (nights, G, 1))
    level = rng.uniform(BASE - 0.05, BASE + 0.05, (nights, G, 1))
    base = level + depth * np.cos(2 * math.pi * (np.arange(SLOTS) + 0.5) / SLOTS + phase)
    feeder = (base * rating[1:, None]).sum(1, keepdims=True) / rating[0]
    cars = rng.choice(POWER, (rounds + 1, n_agents)), rng.choice(LENGTH, (rounds + 1, n_agents))
    return np.concatenate([feeder, base], 1), *cars


def cost(load):
    """C [E] of a night's load [E, 1 + G, H]: Σ_h (x_h − x̄)² of the feeder + w mean_g Σ_h max(0, x_gh − 1)².

    The first is a quadratic generation cost less H x̄², which is given by the energy: no plan changes it.
    """
    overload = np.square((load[:, 1:] - 1).clip(0)).sum(-1).mean(-1)
    return SLOTS * load[:, 0].var(-1) + OVERLOAD * overload


class PowerEnv:
    """`num_envs` feeders with N aggregators each as one. Environment e draws its scenario from seed + e alone.

    load: energy of a night's cars as a fraction of what the valley below the ratings holds. n_plans: K, their start
    slots spread evenly over the night. `constants`: "rating" [1 + G] kVA, "weight" [1 + G] of each row in x,
    "transformer" [N] from 0. Raises InputError on bad options.
    """

    def __init__(self, num_envs, n_agents, rounds=100, load=0.8, n_plans=8):
        if not 0 < load < math.inf or min(num_envs, n_agents, rounds, n_plans) < 1:
            raise InputError("load must be above 0; n_agents, rounds and servers_per_agent at least 1")
        self.num_envs, self.n_agents, self.rounds, self.n_plans = num_envs, n_agents, rounds, n_plans
        G = math.ceil(n_agents / GROUP)
        self.transformer = np.arange(n_agents) % G
        # which agents load which row [1 + G, N]: all of them the feeder, each its transformer
        self.member = np.vstack([np.ones(n_agents), self.transformer == np.arange(G)[:, None]])
        size = self.member[1:].sum(1)  # agents on each transformer
        rating = RATING * size * np.random.default_rng(0).permutation(np.linspace(0.8, 1.2, G))
        self.rating = np.concatenate([[rating.sum()], rating])
        self.position = (np.arange(n_agents) // G + 0.5) / size[self.transformer]  # in its group, from 0 to 1
        # in d = ½‖x − x̃‖² the feeder counts as much as its G transformers together, as in the cost
        self.weight = np.concatenate([[math.sqrt(G)], np.ones(G)])
        self.constants = {"rating": self.rating, "weight": self.weight, "transformer": self.transformer}
        night = WAVES * n_agents * POWER.mean() * LENGTH.mean()  # mean energy of its cars, kW x slots
        self.power_scale = load * self.rating[0] * SLOTS * (1 - BASE) / night

    def __str__(self):
        return f"{self.num_envs} x {self.rounds} rounds of {self.n_agents} aggregators"

    def reset(self, seed):
        """Draw new scenarios and start their first round. Returns obs [E, N, K, F] float32 and info (see `step`)."""
        rngs = (np.random.default_rng(seed + e) for e in range(self.num_envs))
        scenarios = [draw_scenario(rng, self.rounds, self.n_agents, self.rating) for rng in rngs]
        self.base, power, self.length = (np.stack(part, 1) for part in zip(*scenarios))  # [.., E, ..]
        self.power = power * self.power_scale
        self.t = 0
        return self._observe()

    def _observe(self, **played):
        E, N, K, t = self.num_envs, self.n_agents, self.n_plans, self.t
        if t % WAVES == 0:  # a new night
            self.load, self.energy, self.paid = self.base[t // WAVES], np.zeros((E, len(self.rating))), 0.0
        length, when = self.length[t][..., None], np.linspace(0, 1, K)
        self.start = np.rint((SLOTS - length) * when).astype(int)  # [E, N, K]
        slot, start = np.arange(SLOTS), self.start[..., None]
        self.on = (start <= slot) & (slot < start + length[..., None])  # [E, N, K, H]: plan k charges in slot h
        obs = np.empty((E, N, K, 9), dtype=np.float32)
        for row, load in enumerate((self.load[:, :1], self.load[:, 1 + self.transformer])):  # feeder, own transformer
            obs[..., row] = (self.on @ load[..., None])[..., 0] / length  # mean over the plan's slots
            obs[..., 2 + row] = np.where(self.on, load[:, :, None], 0).max(-1)  # the largest of them
        obs[..., 4] = 10 * self.power[t][..., None] / self.rating[1 + self.transformer, None]
        obs[..., 5] = length / LENGTH.max()
        obs[..., 6] = when
        obs[..., 7] = when - self.position[:, None]  # so that agents who see the same can spread
        obs[..., 8] = t % WAVES / WAVES
        parts = self.load, obs[:, :, 0, 4], obs[:, :, 0, 5], obs[:, 0, 0, 8]
        state = np.concatenate([part.reshape(E, -1) for part in parts], 1)
        return obs, {"state": state.astype(np.float32), "played": played}

    def step(self, actions):
        """Book the `actions`-th plan of every agent. actions: [E, N] integers in [0, K).

        Returns obs [E, N, K, 9]; reward [E], minus the rise of the night's cost, so that a night's rewards add up to
        minus its `cost`; terminated [E] (never), truncated [E] (after round T) and info. "state"
        [E, (1 + G) H + 2N + 1]: all loads, every car's power per rating and length, the wave. "played": "x"
        [E, (1 + G) H, 1], row by row the load after the joint action, the feeder's times √G; "base" [E, 1 + G, H] load
        without cars; "energy" [E, 1 + G] of the night's cars so far, in ratings × slots; "power" [E, N] kW; "start"
        [E, N, K] and "length" [E, N] slots.
        """
        E, N, K, t = self.num_envs, self.n_agents, self.n_plans, self.t
        actions = np.asarray(actions)
        if actions.shape != (E, N) or actions.min() < 0 or actions.max() >= K:
            raise ValueError(f"actions must be integers [{E}, {N}] from 0 to {K - 1}, not {actions}")
        power, length = self.power[t], self.length[t]
        chosen = self.on[np.arange(E)[:, None], np.arange(N), actions]  # [E, N, H]
        # x_h ← x_h + Σ_i power_i / rating
        self.load = self.load + self.member @ (chosen * power[..., None]) / self.rating[:, None]
        self.energy = self.energy + (power * length) @ self.member.T / self.rating
        reward, self.paid = self.paid - cost(self.load), cost(self.load)  # the first pays for the base load, too
        x = (self.load * self.weight[:, None]).reshape(E, -1, 1)
        played = dict(x=x, base=self.base[t // WAVES], energy=self.energy, power=power, start=self.start, length=length)
        self.t += 1
        obs, info = self._observe(**played)
        return obs, reward, np.zeros(E, dtype=bool), np.full(E, self.t == self.rounds), info

    def added_cost(self, load, agents=slice(None)):
        """What each plan of these agents would add to the cost of `load`, up to a constant per agent: [E, agents, K].

        The feeder's 2 x_h z and the transformer's w/G [max(0, x_h + z − 1)² − max(0, x_h − 1)²], over the plan's slots.
        """
        feeder, own = load[:, :1], load[:, 1 + self.transformer[agents]]
        power = self.power[self.t][:, agents, None]
        z, own_z = power / self.rating[0], power / self.rating[1 + self.transformer[agents], None]
        overload = np.square((own + own_z - 1).clip(0)) - np.square((own - 1).clip(0))
        in_slot = 2 * feeder * z + OVERLOAD * overload / (len(self.rating) - 1)  # [E, agents, H]
        return (self.on[:, agents] @ in_slot[..., None])[..., 0]

    def heuristic(self):
        """In turn: each agent takes the plan that adds least, with all plans before it known. Returns actions [E, N]."""
        load = self.load.copy()
        actions = np.empty((self.num_envs, self.n_agents), dtype=int)
        for i in range(self.n_agents):
            actions[:, i] = self.added_cost(load, [i])[:, 0].argmin(-1)
            profile = self.on[np.arange(self.num_envs), i, actions[:, i]] * self.power[self.t][:, i, None]
            load += profile[:, None] * (self.member[:, i] / self.rating)[:, None]
        return actions

    def uncoordinated(self):
        """All at once: each agent takes the plan that adds least to what is booked at the round's start."""
        return self.added_cost(self.load).argmin(-1)
