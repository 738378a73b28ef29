"""Heterogeneous cloud scheduling: N agents place one task each, every round, and share one reward.

Everything is array work on [num_envs, N, ...], so that several environments step as one. Letters in shapes:
E environments, N agents, M servers, K reachable servers per agent, T rounds; a last axis of size 2 is (CPU, memory).
CPU is in vCPU, memory in GiB, time in rounds: the mean time between two rounds is 1.
"""

import functools
import itertools
import math
import os
from typing import NamedTuple

import numpy as np

# AWS c5, m5, r5 (2, 4, 8 GiB per vCPU) x large, xlarge, 2xlarge, 4xlarge (2, 4, 8, 16 vCPU)
CATALOGUE = np.array([(vcpu, vcpu * gib) for gib in (2, 4, 8) for vcpu in (2, 4, 8, 16)], dtype=float)

ELEPHANTS = 0.15  # the fraction of tasks that are elephants; the others are mice
SHAPE, LOW, HIGH = 1.5, 10.0, 100.0  # elephants' durations: bounded Pareto on [LOW, HIGH] rounds
PARETO_MEAN = SHAPE / (SHAPE - 1) * (LOW ** (1 - SHAPE) - HIGH ** (1 - SHAPE)) / (LOW**-SHAPE - HIGH**-SHAPE)
MEAN_DURATION = (1 - ELEPHANTS) * (1 + 4) + ELEPHANTS * PARETO_MEAN  # 7.4 rounds (see `draw_scenario`)
GIB_PER_VCPU = np.array([1.0, 2.0, 4.0, 8.0])
# E[cpu duration] in vCPU rounds, before scaling
CPU_WORK = (1 - ELEPHANTS) * 0.55 * (1 + 4) + ELEPHANTS * 2.5 * PARETO_MEAN

COLUMNS = ("arrival_s", "duration_s", "cpu", "memory_gib")  # of a trace


class InputError(ValueError):
    """A user's mistake in an option or a trace, named in one line."""


class Scenario(NamedTuple):
    """An episode's whole workload, independent of any policy. The final observation shows the tasks of round T + 1."""

    demand: np.ndarray  # [T + 1, N, 2] vCPU and GiB
    duration: np.ndarray  # [T + 1, N] rounds of service
    delta: np.ndarray  # [T] time from each round to the next, in rounds


def draw_scenario(rng, rounds, n_agents):
    """Mice and elephants, at the rate λ(t) = 1 + ½ sin(2πt/50 + phase). The demands are not yet scaled to a load."""
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


def offered_load(scenario):
    """L_t [T + 1, 2]: the demand present after round t's arrivals if nothing ever slowed down (M_t/G/∞)."""
    start = np.concatenate([[0], scenario.delta.cumsum()])  # [T + 1]
    leaves = np.searchsorted(start, start[:, None] + scenario.duration)  # [T + 1, N] the first round without it
    leaves = np.maximum(leaves, np.arange(1, len(start) + 1)[:, None])  # each is there when it arrives
    change = np.zeros((len(start) + 1, 2))
    change[:-1] = scenario.demand.sum(1)
    np.subtract.at(change, leaves, scenario.demand)
    return change[:-1].cumsum(0).clip(0)


def load_trace(path):
    """Read a CSV workload trace with the columns arrival_s, duration_s, cpu (vCPU) and memory_gib, sorted by arrival.

    Returns a float array [rows, 4] of these columns, not to be written to. Raises InputError, naming the line, if a
    column is missing or stands twice, there are no rows, a row has more or fewer columns than the header, or a value is
    no number from 0 to 1e15 or out of order; OSError if the file cannot be read.
    """
    return _parse(path, os.stat(path).st_mtime_ns)  # once for both environments of a run


@functools.lru_cache(maxsize=1)
def _parse(path, modified):
    names, lines = [], itertools.count(1)
    try:
        with open(path, encoding="utf-8-sig") as file:
            counted = (text for text, _ in zip(file, lines))  # numpy does not say the line
            names = [name.strip(' "\n') for name in next(counted, "").split(",")]
            if not set(COLUMNS) <= set(names):
                raise ValueError(f"no column {min(set(COLUMNS) - set(names))}")
            dtype = [(name, float if name in COLUMNS else "U1") for name in names]
            rows = itertools.chain([next(counted)], counted)
            table = np.loadtxt(rows, dtype, comments=None, delimiter=",", quotechar='"', ndmin=1)
    except (ValueError, StopIteration) as error:
        reason = str(error) or "no row below the header"
        raise InputError(f"trace {path}: line {next(lines) - 1} of the columns {', '.join(names)}: {reason}") from None
    trace = np.stack([table[name] for name in COLUMNS], -1)
    for row, column in np.argwhere(~((trace >= 0) & (trace < 1e15)))[:1]:
        raise InputError(f"trace {path}: line {row + 2}: {COLUMNS[column]} must be a number from 0 to 1e15")
    for row in np.flatnonzero(np.diff(trace[:, 0]) < 0)[:1] + 1:
        raise InputError(f"trace {path}: line {row + 2}: arrival_s is below the row before, the trace is not sorted")
    trace.setflags(write=False)
    return trace


class CloudEnv:
    """`num_envs` worlds of N schedulers as one, called like a Gymnasium vector environment (no spaces, no autoreset).

    n_agents: N. rounds: T. servers_per_agent: K, cut to M. capacity: [M, 2] vCPU and GiB, or None: N of `CATALOGUE`.
    load: offered load as a fraction of the fleet's capacity: of synthetic load in the long run, of a trace in the mean
    of every episode. trace: a CSV file for `load_trace`, or None for synthetic load. Its demands are scaled to the
    load, its times so that in its first 80 % N arrivals take a round in the mean, and tasks 7.4. held_out: of its last
    20 % `num_envs` stretches, evenly spaced and whatever the seed, instead of random ones of its first 80 %.
    Raises InputError if an option is out of range or the trace cannot be used.

    Agent i reaches the servers (i + offset_k) mod M. Fleet and offsets depend on N, M and K alone, not on a seed.
    `constants` is what the analytical model needs beside a round's own quantities: "capacity" [M, 2], "reach" [N, K].
    Inside, task i of round t in environment e has the number (t E + e) N + i, and server n there the number e M + n.
    """

    def __init__(
        self, num_envs, n_agents, rounds=100, load=0.8, servers_per_agent=8, trace=None, held_out=False, capacity=None
    ):
        if not 0 < load <= 1e6 or min(num_envs, n_agents, rounds, servers_per_agent) < 1:  # above, float32 overflows
            raise InputError("load must be in (0, 1e6]; num_envs, n_agents, rounds and servers_per_agent at least 1")
        self.num_envs, self.n_agents, self.rounds, self.load = num_envs, n_agents, rounds, load
        rng = np.random.default_rng(0)
        if capacity is None:  # shuffled catalogues, the last one cut short
            capacity = CATALOGUE[np.concatenate([rng.permutation(12) for _ in range(0, n_agents, 12)])[:n_agents]]
        self.capacity = np.array(capacity, dtype=float)
        offsets = rng.permutation(len(self.capacity))[:servers_per_agent]
        self.reach = (np.arange(n_agents)[:, None] + offsets) % len(self.capacity)  # [N, K]
        self.constants = {"capacity": self.capacity.copy(), "reach": self.reach.copy()}
        self._starts = [None] * num_envs
        self.trace = None
        if trace is not None:
            self._cut(trace, load_trace(trace), held_out)

    def _cut(self, path, rows, held_out):
        """Take the part of the trace that is trained or evaluated on, in rounds instead of seconds."""
        cut, needed = round(0.8 * len(rows)), self.n_agents * (self.rounds + 1)
        part = rows[cut:] if held_out else rows[:cut]
        if len(part) < needed:
            share = "last 20" if held_out else "first 80"
            raise InputError(
                f"trace {path}: its {share} % has {len(part)} rows, n_agents x (rounds + 1) = {needed} needed"
            )
        sizes = np.column_stack([np.diff(rows[:, 0], prepend=rows[0, 0]), rows[:, 1:]])  # time since the row before
        for column in np.flatnonzero(sizes[:cut].sum(0) <= 0):
            raise InputError(f"trace {path}: {COLUMNS[column]} is the same or 0 in all rows of the first 80 %")
        for row, column in np.argwhere(sizes > sizes.sum(0) / 2)[:1]:  # it alone would decide the scale
            raise InputError(f"trace {path}: line {row + 2}: {COLUMNS[column]} outweighs all other rows together")
        time, duration = sizes[:cut, :2].mean(0)  # a round is the mean time of N arrivals, in the part trained on
        self.trace = part / [time * self.n_agents, duration / MEAN_DURATION, 1, 1]
        if held_out:
            self._starts = np.linspace(0, len(self.trace) - needed, self.num_envs).astype(int)

    def _scenario(self, rng, start):
        """A scenario with its demands scaled to the load: of the trace from row `start`, None for a random one."""
        N, T = self.n_agents, self.rounds
        if self.trace is None:
            scenario = draw_scenario(rng, T, N)
            work = N * CPU_WORK * np.array([1, GIB_PER_VCPU.mean()])  # E[demand duration] of a round's tasks
            return scenario._replace(demand=scenario.demand * self.load * self.capacity.sum(0) / work)  # Little's law
        needed = N * (T + 1)
        start = rng.integers(len(self.trace) - needed + 1) if start is None else start
        arrival, duration, *demand = np.moveaxis(self.trace[start : start + needed].reshape(T + 1, N, 4), -1, 0)
        scenario = Scenario(np.stack(demand, -1), duration, np.diff(arrival[:, 0]))
        mean = offered_load(scenario)[:-1].mean(0) / self.capacity.sum(0)
        scale = np.divide(self.load, mean, out=np.ones(2), where=mean > 1e-100)
        return scenario._replace(demand=scenario.demand * scale)

    def reset(self, seed=0, options=None):
        """Draw new scenarios and start their first round. Returns obs [E, N, K, F] float32 and info (see `step`).

        seed: environment e draws its scenario from seed + e, so that `reset(0)` and `reset(1)` share all but one.
        options: {"scenarios": [one `Scenario` per environment]} sets them instead, their demands taken as they are.
        """
        rngs = (np.random.default_rng(seed + e) for e in range(self.num_envs))
        scenarios = options["scenarios"] if options else list(map(self._scenario, rngs, self._starts))
        self.demand, self.duration, self.delta = (np.stack(part, 1) for part in zip(*scenarios))  # [.., E, ..]
        assert self.demand.shape == (self.rounds + 1, self.num_envs, self.n_agents, 2), f"{self.demand.shape=}"
        self.offered_load = np.stack([offered_load(scenario) for scenario in scenarios], 1)  # [T + 1, E, 2]
        self.x, self.t = np.zeros((self.num_envs, *self.capacity.shape)), 0  # utilisation now
        self.work_left = self.duration.flatten()  # of every task, in rounds of service
        self._per_duration = np.divide(1, self.work_left, out=np.zeros_like(self.work_left), where=self.work_left > 0)
        self._server = np.zeros(len(self.work_left), dtype=int)
        self._live = np.zeros(0, dtype=int)  # the tasks that are placed and not done
        return self._observe()

    def __str__(self):
        cpu, memory = (self.offered_load[:-1] / self.capacity.sum(0)).mean((0, 1))
        text = f"offered load {cpu:.3f} of CPU, {memory:.3f} of memory in {self.num_envs} x {self.rounds} rounds"
        if self.trace is None:
            return text
        return (
            f"{text}; trace of {len(self.trace)} tasks, {len(self.trace) / self.duration[:, 0].size:.0f} episodes; "
            f"rounds {np.median(self.delta):.2g} apart in the median, {(self.delta == 0).mean():.0%} not at all; "
            f"durations {np.median(self.duration):.2g} in the median, {self.duration.max():.2g} at most; "
            f"the largest task takes {(self.demand / self.capacity.mean(0)).max():.2g} mean servers"
        )

    def _observe(self, **played):
        z = self.demand[self.t][:, :, None] / self.capacity.take(self.reach, 0)  # [E, N, K, 2]
        obs = np.empty((*z.shape[:3], 7), dtype=np.float32)
        obs[..., 0:2] = np.log1p(self.x).take(self.reach, 1)
        obs[..., 2:4] = z
        obs[..., 4:6] = np.log(self.capacity).take(self.reach, 0)
        log_duration = np.log(self.duration[self.t].clip(1e-3))  # [E, N]
        obs[..., 6] = log_duration[..., None]
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
        Raises ValueError on actions of the wrong shape, type or range.
        """
        E, N, M, K, t = self.num_envs, self.n_agents, len(self.capacity), self.reach.shape[1], self.t
        actions = np.asarray(actions)
        if actions.shape != (E, N) or actions.dtype.kind not in "iu" or actions.min() < 0 or actions.max() >= K:
            raise ValueError(f"actions must be integers [{E}, {N}] from 0 to {K - 1}, not {actions.dtype} {actions}")
        tasks = np.arange(t * E * N, (t + 1) * E * N)
        self._server[tasks] = (self.reach[np.arange(N), actions] + M * np.arange(E)[:, None]).ravel()
        self._live = np.concatenate([self._live, tasks])
        x = self._utilisation(self._live)
        reward = self._serve(self.delta[t].repeat(M))
        self.x = self._utilisation(self._live)
        self.t += 1
        obs, info = self._observe(x=x, demand=self.demand[t].copy(), offered_load=self.offered_load[t].copy())
        return obs, reward, np.zeros(E, dtype=bool), np.full(E, self.t == self.rounds), info

    def _utilisation(self, tasks):
        """x [E, M, 2] with these tasks present."""
        server, demand = self._server[tasks], self.demand.reshape(-1, 2)
        used = [np.bincount(server, demand[tasks, resource], self.x.size // 2) for resource in range(2)]
        return np.stack(used, -1).reshape(self.x.shape) / self.capacity

    def _serve(self, left):
        """Processor sharing until the next round: all tasks on a server progress at rate 1/max(1, x_cpu, x_mem).

        Each pass takes a slowed server to its next completion or the round's end, and any other to the end at once.
        left: [E M] time until the next round. Returns the reward [E], −(1/N) Σ_tasks (time not served)/duration.
        """
        lost = np.zeros(self.num_envs)
        tasks = self._live
        while len(tasks):
            server, work = self._server[tasks], self.work_left[tasks]
            slowdown = np.maximum(*np.moveaxis(self._utilisation(tasks), -1, 0)).clip(1).ravel()  # [E M]
            end = work * slowdown[server]  # when each task ends if nothing changes
            step = left.copy()
            slow = slowdown[server] > 1
            np.minimum.at(step, server[slow], end[slow])
            served = step / slowdown
            self.work_left[tasks] = np.where(end <= step[server], 0, work - served[server])
            unserved = (step - served)[server] * self._per_duration[tasks]
            lost += np.bincount(server // len(self.capacity), unserved, self.num_envs)
            left = left - step
            tasks = tasks[(self.work_left[tasks] > 0) & (left[server] > 0)]
        self._live = self._live[self.work_left[self._live] > 0]
        return -lost / self.n_agents

    @functools.cached_property
    def turns(self):
        """The agents in groups that share no reachable server, so that none can affect another one of its group."""
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

    def heuristic(self):
        """Best-Fit: each agent in turn, seeing the placements already made in this round. Returns actions [E, N].

        Of the agent's reachable servers that its task fits on, the one with the least capacity left (vCPU and GiB, each
        per mean server, added); if it fits nowhere, the least overloaded one (by its scarcer resource).
        """
        demand = self.demand[self.t]
        free = (1 - self.x) * self.capacity  # [E, M, 2]
        actions = np.empty((self.num_envs, self.n_agents), dtype=np.int64)
        every = np.arange(self.num_envs)[:, None]
        for agents in self.turns:  # a turn is several agents at once where they share no server
            near = self.reach[agents]  # [G, K]
            left = free[:, near] - demand[:, agents, None]  # [E, G, K, 2]
            fits = (left >= 0).all(-1)
            tightest = np.where(fits, (free[:, near] / self.capacity.mean(0)).sum(-1), np.inf).argmin(-1)
            least_overloaded = (left / self.capacity[near]).min(-1).argmax(-1)
            actions[:, agents] = choice = np.where(fits.any(-1), tightest, least_overloaded)
            free[every, near[np.arange(len(agents)), choice]] -= demand[:, agents]
        return actions
