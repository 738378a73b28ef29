"""Heterogeneous cloud scheduling: N agents place one task each, every round, and share one reward.

Everything is array work on [num_envs, N, ...], so that several environments step as one. Letters in shapes:
E environments, N agents, M servers, K reachable servers per agent, T rounds; a last axis of size 2 is (CPU, memory).
CPU is in vCPU, memory in GiB, time in rounds: the mean time between two rounds is 1.
"""

import csv
import functools
import math
from typing import NamedTuple

import numpy as np

# AWS c5, m5, r5 (2, 4, 8 GiB per vCPU) x large, xlarge, 2xlarge, 4xlarge (2, 4, 8, 16 vCPU)
CATALOGUE = np.array([(vcpu, vcpu * gib) for gib in (2, 4, 8) for vcpu in (2, 4, 8, 16)], dtype=float)

ELEPHANTS = 0.15  # the fraction of tasks that are elephants; the others are mice
SHAPE, LOW, HIGH = 1.5, 10.0, 100.0  # elephants' durations: bounded Pareto on [LOW, HIGH] rounds
PARETO_MEAN = SHAPE / (SHAPE - 1) * (LOW ** (1 - SHAPE) - HIGH ** (1 - SHAPE)) / (LOW**-SHAPE - HIGH**-SHAPE)
MEAN_DURATION = (1 - ELEPHANTS) * (1 + 4) + ELEPHANTS * PARETO_MEAN  # 7.4 rounds
GIB_PER_VCPU = np.array([1.0, 2.0, 4.0, 8.0])
# E[cpu duration] in vCPU rounds, before scaling
CPU_WORK = (1 - ELEPHANTS) * 0.55 * (1 + 4) + ELEPHANTS * 2.5 * PARETO_MEAN


class InputError(SystemExit):
    """A user's mistake in an option or a trace, named in one line, with which it ends the program if not caught."""


class Scenario(NamedTuple):
    """An episode's whole workload, drawn before its first round and so independent of any policy.

    The round after the last is never placed: the final observation shows its tasks.
    """

    demand: np.ndarray  # [T + 1, N, 2] vCPU and GiB
    duration: np.ndarray  # [T + 1, N] rounds of service
    delta: np.ndarray  # [T] time from each round to the next, in rounds


def draw_scenario(rng, rounds, n_agents, trace=None, start=None):
    """A stretch of the trace if there is one; else mice and elephants, at the rate λ(t) = 1 + ½ sin(2πt/50 + phase).

    trace: rows from `load_trace`, in rounds instead of seconds. start: the stretch's first row, None for a random one.
    The demands are not yet scaled to a load.
    """
    if trace is not None:
        needed = n_agents * (rounds + 1)
        start = rng.integers(len(trace) - needed + 1) if start is None else start
        tasks = trace[start : start + needed].reshape(rounds + 1, n_agents, 4)
        return Scenario(tasks[:, :, 2:], tasks[:, :, 1], np.diff(tasks[:, 0, 0]))
    phase, t, delta = rng.uniform(0, 2 * math.pi), 0.0, np.empty(rounds)
    for k in range(rounds):
        delta[k] = 1 / (1 + 0.5 * math.sin(2 * math.pi * t / 50 + phase))  # Δ_t = Δ̄/λ(t), Δ̄ = 1 round
        t += delta[k]
    shape = (rounds + 1, n_agents)
    elephant = rng.random(shape) < ELEPHANTS
    cpu = np.where(elephant, rng.uniform(1, 4, shape), rng.uniform(0.1, 1, shape))
    # inverse distribution function of the bounded Pareto: u LOW^-s + (1 − u) HIGH^-s = d^-s
    u = rng.random(shape)
    pareto = (u * LOW**-SHAPE + (1 - u) * HIGH**-SHAPE) ** (-1 / SHAPE)
    duration = np.where(elephant, pareto, 1 + rng.exponential(4, shape))
    return Scenario(np.stack([cpu, cpu * rng.choice(GIB_PER_VCPU, shape)], -1), duration, delta)


def load_trace(path):
    """Read a CSV workload trace with the columns arrival_s, duration_s, cpu (vCPU) and memory_gib, sorted by arrival.

    Returns a float array [rows, 4] of these columns. Raises InputError, naming the line and the column, if the file or
    a column is missing, there are no rows, or a value is no number from 0 to 1e15 or out of order.
    """
    names, values, lines = ("arrival_s", "duration_s", "cpu", "memory_gib"), [], []

    def number(text):
        try:
            return float(text)
        except (TypeError, ValueError):  # a short row has None here
            return math.nan

    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for name in names:
                if name not in (reader.fieldnames or ()):
                    raise InputError(f"trace {path}: line 1 has no column {name}")
            for row in reader:
                values.append([number(row[name]) for name in names])
                lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"trace {path}: {error}") from None
    if not values:
        raise InputError(f"trace {path}: no rows below the header")
    trace = np.array(values)
    for row, column in np.argwhere(~((trace >= 0) & (trace < 1e15)))[:1]:
        raise InputError(f"trace {path}: line {lines[row]}: {names[column]} must be a number from 0 to 1e15")
    for row in np.flatnonzero(np.diff(trace[:, 0]) < 0)[:1] + 1:
        raise InputError(f"trace {path}: line {lines[row]}: arrival_s is below the row before, the trace is not sorted")
    return trace


class CloudEnv:
    """`num_envs` worlds of N schedulers as one, called like a Gymnasium vector environment without spaces, autoreset.

    All worlds end together after T rounds, and then `reset` must be called. Environment e is seeded with seed + e, so
    that `reset(seed)` and `reset(seed + 1)` share all scenarios but one.

    n_agents: N. rounds: T. load: offered load as a fraction of the fleet's capacity, of synthetic load in the long run;
    a trace's demands are scaled so that it is the mean over every episode's rounds, which start empty.
    servers_per_agent: K, cut to M. trace: a CSV file for `load_trace`, or None for synthetic load. held_out: of the
    trace's last 20 % `num_envs` stretches, evenly spaced and whatever the seed, instead of random ones of its first
    80 %. capacity: [M, 2] vCPU and GiB, or None for N servers from `CATALOGUE`, every type equally often.

    Agent i reaches the servers (i + offset_k) mod M. Fleet and offsets depend on N, M and K alone, not on a seed.
    `constants` is what the analytical model needs beside a round's own quantities: "capacity" [M, 2], "reach" [N, K].
    Raises InputError if an option is out of range or the trace too short.
    """

    def __init__(
        self, num_envs, n_agents, rounds=100, load=0.8, servers_per_agent=8, trace=None, held_out=False, capacity=None
    ):
        if not 0 < load < math.inf or min(num_envs, n_agents, rounds, servers_per_agent) < 1:
            raise InputError("load must be above 0; num_envs, n_agents, rounds and servers_per_agent at least 1")
        self.num_envs, self.n_agents, self.rounds = num_envs, n_agents, rounds
        rng = np.random.default_rng(0)
        if capacity is None:  # shuffled catalogues, the last one cut short
            capacity = CATALOGUE[np.concatenate([rng.permutation(12) for _ in range(0, n_agents, 12)])[:n_agents]]
        self.capacity = np.array(capacity, dtype=float)
        self.n_servers = len(self.capacity)
        offsets = rng.permutation(self.n_servers)[:servers_per_agent]
        self.reach = (np.arange(n_agents)[:, None] + offsets) % self.n_servers  # [N, K]
        self.constants = {"capacity": self.capacity.copy(), "reach": self.reach.copy()}
        self.t = self.trace = None  # no round yet: call reset
        work = CPU_WORK * np.array([1, GIB_PER_VCPU.mean()])  # E[demand duration] of a task
        self.load, self.demand_scale = load, load * self.capacity.sum(0) / (n_agents * work)  # Little's law
        self._starts = [None] * num_envs
        if trace is not None:
            rows = load_trace(trace)
            # a round is the mean time that N arrivals take; durations as in synthetic load
            seconds = (rows[-1, 0] - rows[0, 0]) / len(rows) * n_agents, rows[:, 1].mean() / MEAN_DURATION
            if min(*seconds, *rows[:, 2:].sum(0)) <= 0:
                raise InputError(f"trace {trace}: all arrivals at once, or duration_s, cpu or memory_gib all 0")
            cut, needed = round(0.8 * len(rows)), n_agents * (rounds + 1)
            self.trace = (rows[cut:] if held_out else rows[:cut]) / [*seconds, 1, 1]
            if len(self.trace) < needed:
                part = f"its {'last 20' if held_out else 'first 80'} % has {len(self.trace)} rows"
                least = f"n_agents x (rounds + 1) = {needed} needed in either, {5 * needed} in all; or fewer --rounds"
                raise InputError(f"trace {trace}: {part}, {least}")
            if held_out:
                self._starts = np.linspace(0, len(self.trace) - needed, num_envs).astype(int)
        self._rngs = [np.random.default_rng() for _ in range(num_envs)]

    def reset(self, seed=None, options=None):
        """Draw new scenarios and start their first round. Returns obs [E, N, K, F] float32 and info (see `step`).

        seed: environment e is seeded with seed + e; None goes on with its generator.
        options: {"scenarios": [one `Scenario` per environment]} sets them instead, their demands taken as they are.
        Raises ValueError on scenarios of the wrong number or shape.
        """
        E, N, T = self.num_envs, self.n_agents, self.rounds
        if seed is not None:
            self._rngs = [np.random.default_rng(seed + e) for e in range(E)]
        scale = self.demand_scale
        if not options:
            scenarios = [draw_scenario(rng, T, N, self.trace, start) for rng, start in zip(self._rngs, self._starts)]
        else:
            scenarios, scale = options["scenarios"], 1
        shapes = [tuple(np.shape(part) for part in scenario) for scenario in scenarios]
        if shapes != [((T + 1, N, 2), (T + 1, N), (T,))] * E:
            raise ValueError(f"reset needs {E} scenarios of demand [{T + 1}, {N}, 2] and so on, not {shapes}")
        # task (t, e, i) has the number (t E + e) N + i, so that the tasks of a round are neighbours
        self.demand = np.stack([s.demand for s in scenarios], 1) * scale
        self.duration = np.stack([s.duration for s in scenarios], 1)
        self.delta = np.stack([s.delta for s in scenarios], 1)
        self.offered_load = self._offered_load()  # [T + 1, E, 2]
        if self.trace is not None and not options:  # `load`, as the mean over the rounds of each episode
            mean = self.offered_load[:-1].mean(0) / self.capacity.sum(0)
            scale = np.divide(self.load, mean, out=np.ones_like(mean), where=mean > 1e-100)  # [E, 2]
            self.demand, self.offered_load = self.demand * scale[:, None], self.offered_load * scale
        self.work_left = self.duration.flatten()  # of every task, in rounds of service
        # 1/duration, 0 for a task without any
        self._weight = np.divide(1, self.work_left, out=np.zeros_like(self.work_left), where=self.work_left > 0)
        self._server = np.zeros(len(self.work_left), dtype=np.int64)  # e M + n of every task that is placed
        self._live = np.zeros(0, dtype=np.int64)  # the tasks that are placed and not done
        self.x, self.t = np.zeros((E, self.n_servers, 2)), 0  # utilisation now
        return self._observe()

    def __str__(self):
        cpu, memory = (self.offered_load[:-1] / self.capacity.sum(0)).mean((0, 1))
        room = self.num_envs if self._starts[0] is None else len(self.trace) // self.demand[:, 0, :, 0].size
        text = f"offered load {cpu:.3f} of CPU, {memory:.3f} of memory in {self.num_envs} x {self.rounds} rounds"
        return text + (f" that overlap: {room} would lie apart" if room < self.num_envs else "")

    def _offered_load(self):
        """L_t [T + 1, E, 2]: the demand present after round t's arrivals if nothing ever slowed down (M_t/G/∞)."""
        start = np.concatenate([np.zeros((1, self.num_envs)), self.delta.cumsum(0)])  # [T + 1, E]
        change = np.zeros((self.rounds + 2, self.num_envs, 2))
        for e in range(self.num_envs):
            leaves = np.searchsorted(start[:, e], start[:, e, None] + self.duration[:, e])  # the first round without it
            present = np.where((leaves > np.arange(self.rounds + 1)[:, None])[..., None], self.demand[:, e], 0)
            change[:-1, e] += present.sum(1)
            np.subtract.at(change[:, e], leaves, present)
        return change[:-1].cumsum(0).clip(0)

    def _observe(self, **played):
        z = self.demand[self.t][:, :, None] / self.capacity[self.reach]  # [E, N, K, 2]
        obs = np.empty((*z.shape[:3], 7), dtype=np.float32)
        obs[..., 0:2] = np.log1p(self.x)[:, self.reach]
        obs[..., 2:4] = z
        obs[..., 4:6] = np.log(self.capacity)[self.reach]
        obs[..., 6] = log_duration = np.log(self.duration[self.t].clip(1e-3))[..., None]
        parts = self.x, self.offered_load[self.t] / self.capacity.sum(0), self.demand[self.t] / self.capacity.mean(0)
        state = np.concatenate([part.reshape(self.num_envs, -1) for part in (*parts, log_duration)], 1)
        return obs, {"state": state.astype(np.float32), "played": played}

    def step(self, actions):
        """Place every agent's task on the `actions`-th of its reachable servers, and serve until the next round.

        actions: [E, N] integers in [0, K). Returns obs [E, N, K, F], F = 7: log(1 + x), z, log capacity, log duration;
        reward [E]; terminated [E] (never), truncated [E] (after round T: bootstrap from this observation) and info.

        info["state"] [E, 2M + 2 + 3N]: the global state that belongs to obs: all x, offered load per capacity, every
        agent's demand per the fleet's mean capacity and log duration.
        info["played"]: of the round just played (empty after `reset`) "x" [E, M, 2], utilisation right after the joint
        action, "demand" [E, N, 2] and "offered_load" [E, 2], both in vCPU and GiB.
        Raises ValueError on actions of the wrong shape, type or range, RuntimeError before `reset` and after the end.
        """
        E, N, M, K, t = self.num_envs, self.n_agents, self.n_servers, self.reach.shape[1], self.t
        if t is None or t == self.rounds:
            raise RuntimeError("the episode is over or has not begun: call reset")
        actions = np.asarray(actions)
        if actions.shape != (E, N) or actions.dtype.kind not in "iu" or actions.min() < 0 or actions.max() >= K:
            raise ValueError(f"actions must be integers [{E}, {N}] from 0 to {K - 1}, not {actions.dtype} {actions}")
        tasks = np.arange(t * E * N, (t + 1) * E * N)
        self._server[tasks] = (self.reach[np.arange(N), actions] + M * np.arange(E)[:, None]).ravel()
        live = np.concatenate([self._live, tasks])
        x = self._utilisation(live)
        reward = self._serve(live, x.reshape(E * M, 2), self.delta[t].repeat(M))
        self.x = self._utilisation(self._live)
        self.t += 1
        obs, info = self._observe(x=x, demand=self.demand[t].copy(), offered_load=self.offered_load[t].copy())
        return obs, reward, np.zeros(E, dtype=bool), np.full(E, self.t == self.rounds), info

    def _utilisation(self, live):
        """x [E, M, 2] with the tasks `live` present."""
        server, demand = self._server[live], self.demand.reshape(-1, 2)
        used = [np.bincount(server, demand[live, resource], self.num_envs * self.n_servers) for resource in range(2)]
        return np.stack(used, -1).reshape(self.num_envs, self.n_servers, 2) / self.capacity

    def _serve(self, live, x, delta):
        """Processor sharing for `delta` [E M], exactly: all tasks on a server progress at rate 1/max(1, x_cpu, x_mem).

        As they progress alike, they end in the order of their work left, w_1 ≤ w_2 ≤ …, and between the ends k and k+1
        the slowdown s_k is constant. Until end k a task loses lost_k = Σ_{j<k} (w_{j+1} − w_j)(s_j − 1). Only tasks
        with w ≤ Δ can end. Returns the reward [E], −(1/N) Σ_tasks (time not served)/duration.
        """
        server, work = self._server[live], self.work_left[live]
        ends = work <= delta[server]
        lost = np.zeros(len(delta))  # time not served to the tasks that stay, per server
        late = np.zeros(len(live))  # time not served to the tasks that end
        contended = np.flatnonzero((x > 1).any(-1))  # nothing is lost elsewhere
        if len(contended):
            # a row for each contended server; column 0 is the slot's start and column k its k-th end
            rows = np.full(len(delta), -1)
            rows[contended] = np.arange(len(contended))
            tasks = np.flatnonzero(ends & (rows[server] >= 0))
            tasks = tasks[np.lexsort((work[tasks], server[tasks]))]
            row = rows[server[tasks]]
            count = np.bincount(row, minlength=len(contended))
            column = np.arange(1, len(row) + 1) - (count.cumsum() - count)[row]
            w = np.full((len(contended), count.max() + 1), np.nan)  # NaN: there is no such end
            w[:, 0], w[row, column] = 0, work[tasks]
            gone = np.zeros((*w.shape, 2))
            gone[row, column] = self.demand.reshape(-1, 2)[live[tasks]]
            x_k = x[contended, None] - gone.cumsum(1) / self.capacity[contended % self.n_servers, None]
            s = np.maximum(1, np.maximum(x_k[..., 0], x_k[..., 1]))
            lost_k = np.zeros_like(w)
            np.cumsum(np.diff(w) * (s[:, :-1] - 1), 1, out=lost_k[:, 1:])
            time = w + lost_k
            done = time <= delta[contended, None]
            last = np.arange(len(contended)), done.sum(1) - 1
            lost[contended] = lost_k[last] + (delta[contended] - time[last]) * (1 - 1 / s[last])
            ends[tasks], late[tasks] = done[row, column], lost_k[row, column]
        late = np.where(ends, late, lost[server])
        self.work_left[live] = np.where(ends, 0, work - (delta - lost)[server])
        self._live = live[~ends]
        return -np.bincount(server // self.n_servers, late * self._weight[live], self.num_envs) / self.n_agents

    @functools.cached_property
    def turns(self):
        """The agents in groups that share no reachable server, for `best_fit`: none can affect another of its group."""
        turns, waiting = [], range(self.n_agents)
        while len(waiting):
            taken, turn = set(), []
            for agent in waiting:
                if taken.isdisjoint(self.reach[agent]):
                    taken.update(self.reach[agent])
                    turn.append(agent)
            turns.append(np.array(turn))
            waiting = np.setdiff1d(waiting, turn)
        return turns


def random_policy(env, obs=None):
    """Uniform actions [E, N], the same draws in every episode."""
    return np.random.default_rng(env.t).integers(env.reach.shape[1], size=(env.num_envs, env.n_agents))


def best_fit(env, obs=None):
    """Best-Fit: each agent in turn, seeing the placements already made in this round. Returns actions [E, N].

    Of the agent's reachable servers that its task fits on, the one with the least capacity left (vCPU and GiB, each in
    units of the fleet's mean server, added); if it fits nowhere, the least overloaded one (by its scarcer resource).
    """
    demand, units = env.demand[env.t], env.capacity.mean(0)
    free = (1 - env.x) * env.capacity  # [E, M, 2]
    actions = np.empty((env.num_envs, env.n_agents), dtype=np.int64)
    every = np.arange(env.num_envs)[:, None]
    for agents in env.turns:  # a turn is several agents at once where they share no server
        near = env.reach[agents]  # [G, K]
        room = free[:, near]  # [E, G, K, 2]; a task takes the same off `room` on every server, so it ranks them for all
        left = room - demand[:, agents, None]
        fits = (left[..., 0] >= 0) & (left[..., 1] >= 0)
        choice = np.where(fits, room @ (1 / units), np.inf).argmin(-1)
        e, g = np.nonzero(~fits.any(-1))
        choice[e, g] = (left[e, g] / env.capacity[near[g]]).min(-1).argmax(-1)
        actions[:, agents] = choice
        free[every, near[np.arange(len(agents)), choice]] -= demand[:, agents]
    return actions
