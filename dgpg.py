"""Descent-Guided Policy Gradient (DG-PG, Yang & Liu 2026, arXiv 2602.20078): MAPPO, guided by an analytical model.

Trains N agents that share one reward, on heterogeneous cloud scheduling, and measures them on held-out scenarios.
The model gives each agent its own gradient g_i = ⟨x − x̃, z_i⟩, whose noise does not grow with N: Â ← (1−α) Â − α g.

Letters in shapes: N agents, E environments, T rounds, B states of a batch, K actions, F features of an action.
In the model: M components of the system, R quantities of each, J components that one action touches.
"""

import math
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.distributions import Categorical, Distribution
from torch.utils.tensorboard import SummaryWriter

from analytic_model import deviation, local_influence, reference_state
from cloud_env import CloudEnv, InputError, best_fit, random_policy


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment: workload, initial weights, sampled actions
    cuda: bool = False  # train on a GPU if there is one (not measured)
    init_actor: str | None = None  # a run's checkpoint.pt to take the actor from, of any N if the actor is shared
    resume: str | None = None  # the folder of an interrupted run to go on with, under its own options
    n_agents: int = 50  # number of agents N, each with one task per round; also the number of servers
    rounds: int = 100  # rounds T of one episode
    load: float = 0.8  # offered load as a fraction of the fleet's capacity (of a trace: each episode's mean)
    servers_per_agent: int = 8  # servers K that an agent reaches (N if that is fewer)
    trace: str | None = None  # a CSV file of real workload: trains on its first 80 %, evaluates on its last 20 %
    episodes: int = 10  # training episodes, all environments counted
    eval_every: int = 5  # episodes between two evaluations
    eval_scenarios: int = 0  # held-out scenarios of an evaluation; 0: 2,000 / N, at least 2 and at most 40
    num_envs: int = 1  # environments E that step together
    num_steps: int = 10  # rounds of every environment per update; a divisor of rounds
    share_parameters: bool = True  # one actor for all agents, or one actor per agent
    hidden: int = 32  # width of the actor's two hidden layers
    learning_rate: float = 1.5e-2  # Adam's learning rate, actor and critic
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    gamma: float = 0.97  # discount factor per round
    gae_lambda: float = 0.9  # λ of generalised advantage estimation
    num_minibatches: int = 2  # minibatches per epoch, each of num_steps E / num_minibatches states
    minibatch_agents: int = 50  # agents that a minibatch draws if they share the actor; it has all if not
    update_epochs: int = 10  # epochs per update
    clip_coef: float = 0.2  # clip range of the policy ratio
    ent_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # largest gradient norm, of each actor and of the critic
    alpha_start: float = 1.0  # weight α of the guidance at the beginning
    alpha_end: float = 0.5  # weight α of the guidance at the end, linear in between
    own_action_expectation: bool = True  # guide all own actions by their probabilities; or the sampled one


def check(args):
    """Raises InputError, naming the option, where a value would fail late or silently train something else."""
    for name, kind in Args.__annotations__.items():
        low = 1 if kind is int and name not in ("seed", "episodes", "eval_scenarios") else 0
        high = dict(seed=99_999, gamma=1, gae_lambda=1, alpha_start=1, alpha_end=1).get(name, 10**9)
        if kind in (int, float) and not low <= getattr(args, name) <= high:
            raise InputError(f"{name} must be from {low} to {high}, not {getattr(args, name)}")
    if (states := args.num_steps * args.num_envs) < max(2, args.num_minibatches):  # one cannot be standardised
        raise InputError(f"num_steps x num_envs = {states} must be at least 2 and num_minibatches")
    for whole, part in (("episodes", "num_envs"), ("rounds", "num_steps")):
        if getattr(args, whole) % getattr(args, part):
            raise InputError(f"{whole} = {getattr(args, whole)} is no multiple of {part} = {getattr(args, part)}")


class MLP(nn.Module):
    """`copies` separate networks in -> hidden -> hidden -> 1 as stacked weights, one batched product for each layer."""

    def __init__(self, copies, inputs, hidden, output_gain):
        super().__init__()
        self.copies, sizes = copies, [inputs, hidden, hidden, 1]
        self.weights = nn.ParameterList(torch.empty(copies, *shape) for shape in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(copies, 1, size) for size in sizes[1:])
        for stack, gain in zip(self.weights, (np.sqrt(2), np.sqrt(2), output_gain)):
            for weight in stack:
                nn.init.orthogonal_(weight, gain)

    def forward(self, x):
        """x: [N, ..., inputs], N = copies, or anything for one copy. Returns [N, ...]."""
        assert self.copies in (1, x.shape[0]), (self.copies, x.shape)
        h = x.reshape(self.copies, -1, x.shape[-1])
        *layers, (weight, bias) = zip(self.weights, self.biases)
        for hidden_weight, hidden_bias in layers:
            h = torch.baddbmm(hidden_bias, h, hidden_weight).relu_()
        return torch.baddbmm(bias, h, weight).reshape(x.shape[:-1])

    def clip_grad(self, max_norm):
        """Give each network the gradient of its own loss, scaled to a norm of at most `max_norm`."""
        grads = [weight.grad for weight in self.parameters()]  # of the mean of their losses: 1/copies of their own
        norms = self.copies * torch.cat([grad.flatten(1) for grad in grads], 1).norm(dim=1)  # [copies]
        assert norms.isfinite().all(), "a gradient is not finite; the run's checkpoint is from before this update"
        scale = self.copies * (max_norm / (norms + 1e-6)).clamp(max=1).view(-1, 1, 1)
        for grad in grads:
            grad.mul_(scale)


class ValueNorm(nn.Module):
    """Running mean and deviation of the returns, so that the critic learns standard scores (Yu et al. 2022)."""

    def __init__(self, beta=0.9):
        super().__init__()
        self.beta = beta
        for name in ("running_mean", "running_mean_sq", "debiasing_term"):
            self.register_buffer(name, torch.zeros(()))

    def update(self, returns):
        self.running_mean.lerp_(returns.mean(), 1 - self.beta)
        self.running_mean_sq.lerp_((returns**2).mean(), 1 - self.beta)
        self.debiasing_term.lerp_(torch.ones_like(self.debiasing_term), 1 - self.beta)  # 1 − β^updates

    def mean_std(self):  # (0, 1) before the first update
        mean, mean_sq = (x / self.debiasing_term.clamp(min=1e-8) for x in (self.running_mean, self.running_mean_sq))
        return mean, torch.where(self.debiasing_term > 0, (mean_sq - mean**2).clamp(min=1e-4).sqrt(), 1.0)


def gae(rewards, values, gamma, gae_lambda):
    """Generalised advantage estimation of a stretch that the clock cuts off (Schulman et al. 2016, eq. 16).

    rewards: [T, E]. values: [..., T + 1, E], the last one bootstrapped from: no state is terminal. Returns [..., T, E].
    """
    advantages, advantage = torch.zeros_like(values[..., 1:, :]), 0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * values[..., t + 1, :] - values[..., t, :]  # δ_t = r_t + γ V(s_{t+1}) − V(s_t)
        advantages[..., t, :] = advantage = delta + gamma * gae_lambda * advantage  # Â_t = δ_t + γλ Â_{t+1}
    return advantages


def guidance(x, x_ref, z, touched, actions):
    """g_i(a') = ⟨x_{−i} + z_i(a') − x̃, z_i(a')⟩ of every action a', with the others as they were (Yang & Liu 2026).

    x, x_ref: state after the joint action and reference x̃ [B, M, R]. z: influence of every action [B, N, K, J, R] on
    the components `touched` [B, N, K, J], of which actions may share some. actions: the ones taken [N, B].
    Returns [N, B, K]: g_i = ⟨x − x̃, z_i⟩ for the action taken. Σ_i E[g_i ∇log π_i] = ∇E[d(x, x̃) + ½ Σ_i ‖z_i‖²].
    """
    (B, N, K, J, R), M = z.shape, x.shape[1]
    assert x.shape == x_ref.shape == (B, M, R), f"{x.shape=} {x_ref.shape=} {z.shape=}"
    assert touched.shape == (B, N, K, J) and actions.shape == (N, B), f"{touched.shape=} {actions.shape=} {z.shape=}"
    assert 0 <= touched.min() and touched.max() < M, f"touched must be numbers of the {M} components"
    states, agents = torch.arange(B), torch.arange(N).unsqueeze(1)
    z, touched = z.transpose(0, 1), touched.transpose(0, 1)  # agents first
    own_z, own_touched = z[agents, states, actions].unsqueeze(2), touched[agents, states, actions].unsqueeze(2)
    shared = (touched.unsqueeze(-1) == own_touched.unsqueeze(-2)).unsqueeze(-1)  # components that a_i touches, too
    repeated = (touched.unsqueeze(-1) == touched.unsqueeze(-2)).unsqueeze(-1)  # a component may stand twice in a row
    without = (x - x_ref)[states.view(B, 1, 1), touched] - (shared * own_z.unsqueeze(-3)).sum(-2)  # x_{−i} − x̃
    return ((without + (repeated * z.unsqueeze(-3)).sum(-2)) * z).sum((-2, -1))


def evaluate(env, policy):
    """Mean undiscounted return of `policy(env, obs)` -> actions [E, N] on the held-out scenarios."""
    (obs, _), returns = env.reset(seed=10**12), 0  # training scenarios have smaller seeds
    for _ in range(env.rounds):
        obs, reward, _, _, _ = env.step(policy(env, obs))
        assert reward.shape == (env.num_envs,) and np.isfinite(reward).all(), f"a reward [E] cannot be {reward}"
        returns = returns + reward
    return returns.mean().item()


def restore(path, **parts):
    """What torch.save wrote; each part is set from it. Raises InputError if it cannot be read or does not fit."""
    try:
        saved = dict(torch.load(path, weights_only=True, map_location="cpu"))
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        return saved
    except Exception as error:
        raise InputError(f"{path} cannot be used: {type(error).__name__} {' '.join(str(error).split())}") from None


def train(args):
    """Train and evaluate as `args` says. Returns the final line's figures. Raises InputError on bad options."""
    # SET UP: nothing is written before all options are known to be good
    start_time, checkpoint, script = time.time(), None, os.path.basename(__file__)
    if args.resume is not None:
        folder, checkpoint = args.resume, restore(f"{args.resume}/checkpoint.pt")
        known = checkpoint.get("script") == script and checkpoint["args"].keys() == asdict(args).keys()
        if args != Args(resume=folder) or not known:
            raise InputError(f"resume: {folder} must be a run of this {script}, under its own options: give no other")
        args, start_time = Args(**checkpoint["args"]), start_time - checkpoint["seconds"]
    check(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it brings
    Distribution.set_default_validate_args(False)  # its checks take as long as the sampling
    torch.set_default_device("cuda" if args.cuda and torch.cuda.is_available() else None)

    # ENVIRONMENTS
    task = args.n_agents, args.rounds, args.load, args.servers_per_agent, args.trace
    env, N, E, T = CloudEnv(args.num_envs, *task), args.n_agents, args.num_envs, args.rounds
    eval_env = CloudEnv(args.eval_scenarios or max(2, min(40, 2_000 // N)), *task, held_out=True)
    next_obs, info = env.reset(seed=0)  # for the shapes
    assert next_obs.ndim == 4 and next_obs.shape[:2] == (E, N), f"obs must be [{E}, {N}, K, F], not {next_obs.shape}"
    assert info["state"].ndim == 2 and len(info["state"]) == E, f"state must be [{E}, S], not {info['state'].shape}"

    # NETWORKS: the actor scores the features of one action
    actor = MLP(1 if args.share_parameters else N, next_obs.shape[-1], args.hidden, output_gain=0.01)
    critic = MLP(1, info["state"].shape[-1], 64, output_gain=1.0)  # V(s) of the global state
    if args.init_actor is not None and not checkpoint:
        restore(args.init_actor, actor=actor)
    value_norm, parameters = ValueNorm(), [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    parts = {"actor": actor, "critic": critic, "value_norm": value_norm, "optimizer": optimizer}

    def tensor(array):
        copy = torch.tensor(array)
        return copy.float() if copy.is_floating_point() else copy  # whole numbers stay

    @torch.inference_mode()
    def policy(env, obs, argmax=False):
        logits = actor(tensor(obs).transpose(0, 1))  # [N, E, K]
        actions = logits.argmax(-1) if argmax else Categorical(logits=logits).sample()
        return actions.T.cpu().numpy()

    # REFERENCE POLICIES, or the run to go on with
    start, train_seconds, result = 0, 0.0, {}
    if checkpoint:
        restore(f"{folder}/checkpoint.pt", **parts)
        torch.set_rng_state(checkpoint["rng"])
        torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
        start, train_seconds, result = (checkpoint[name] for name in ("episode", "train_seconds", "result"))
    else:
        print(
            f"{args.exp_name}: {N} agents, {next_obs.shape[2]} actions, {torch.get_default_device()}; {env}", flush=True
        )
        for name, reference in (("best_fit", best_fit), ("random", random_policy)):
            result[f"{name}_return"] = evaluate(eval_env, reference)
            print(f"mean return of {name}: {result[f'{name}_return']:.2f}, {eval_env}", flush=True)
        folder = f"runs/{args.exp_name}__n{N}__{args.seed}__{time.time_ns()}"
    print(f"if it is interrupted, go on with: python {script} --resume {folder}", flush=True)
    writer = SummaryWriter(folder, purge_step=start + 1)  # what was logged after the checkpoint is logged again

    def save_checkpoint(episode):
        """All that --resume needs, written aside and renamed: at any moment there is a whole one."""
        writer.flush()
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= dict(script=script, args=asdict(args), episode=episode, train_seconds=train_seconds, result=result)
        state |= dict(rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state_all())
        torch.save(state | dict(seconds=time.time() - start_time), f"{folder}/checkpoint.new")
        os.replace(f"{folder}/checkpoint.new", f"{folder}/checkpoint.pt")

    def measure(episode):
        """Evaluate the actor on the held-out scenarios, log it under `episode` and print a line."""
        with torch.random.fork_rng():  # the training's random stream goes on as if there had been no evaluation
            torch.manual_seed(args.seed)
            value = evaluate(eval_env, policy)
        best, random = result["best_fit_return"], result["random_return"]
        score, cost_ratio = (value - random) / ((best - random) or math.nan), value / (best or math.nan)
        result.update({"return": value, "score": score, "cost_ratio": cost_ratio})
        sps = episode * T * N / (train_seconds or math.nan)
        left = (time.time() - loop_time) / ((episode - start) or math.nan) * (args.episodes - episode)
        print(f"{episode:8d} {value:10.2f} {score:8.4f} {cost_ratio:10.3f} {sps:9.0f} {left:7.0f}", flush=True)
        if episode == args.episodes:
            result["return_argmax"] = evaluate(eval_env, lambda *seen: policy(*seen, argmax=True))
        for name, number in result.items():
            writer.add_scalar(f"eval/{name}", number, episode)

    loop_time = time.time()
    print(f"{'episodes':>8} {'return':>10} {'score':>8} {'cost_ratio':>10} {'SPS':>9} {'left_s':>7}", flush=True)
    if not checkpoint:
        options = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|option|value|\n|-|-|\n{options}")
        if args.init_actor or not args.episodes:
            measure(0)
        save_checkpoint(0)

    constants = {name: tensor(value) for name, value in env.constants.items()}
    for episode in range(start + E, args.episodes + 1, E):  # an episode of every environment
        episode_start, episodic_return, losses = time.time(), 0, []
        next_obs, info = env.reset(seed=args.seed * 10**6 + episode - E)  # scenarios of this seed and episode
        for first in range(0, T, args.num_steps):  # an update takes the next num_steps rounds
            progress = (episode - E + first / T * E) / args.episodes  # from 0 to 1
            # ROLLOUT
            steps, states, rewards, played = [], [], [], []
            for t in range(first, first + args.num_steps):
                obs = tensor(next_obs).transpose(0, 1)  # [N, E, K, F], agents first
                states.append(tensor(info["state"]))
                dist = Categorical(logits=actor(obs).detach())
                actions = dist.sample()
                steps.append((obs, actions, dist.logits))  # log π(a): Categorical has normalised its logits
                next_obs, reward, terminated, truncated, info = env.step(actions.T.cpu().numpy().copy())
                assert (truncated == (t == T - 1)).all() and not terminated.any(), "round T alone must be cut off"
                rewards.append(tensor(reward).float())
                played.append({name: tensor(value) for name, value in info["played"].items()})
            states.append(tensor(info["state"]))  # the last state has a value: bootstrap from it

            # ADVANTAGES, from values in the reward's units
            rewards, states = torch.stack(rewards), torch.stack(states, -3)
            episodic_return += rewards.sum(0).mean()
            mean, std = value_norm.mean_std()
            values = critic(states).detach() * std + mean  # [num_steps + 1, E]
            advantages = gae(rewards, values, args.gamma, args.gae_lambda)
            returns = advantages + values[..., :-1, :]
            explained_variance = 1 - advantages.var(correction=0) / returns.var(correction=0)
            value_norm.update(returns)
            mean, std = value_norm.mean_std()
            b_obs, b_actions, b_logits = (torch.stack(part, 1).flatten(1, 2) for part in zip(*steps))
            b_states, b_returns = states[..., :-1, :, :].flatten(-3, -2), ((returns - mean) / std).flatten(-2)
            advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
            b_advantages = advantages.flatten(-2).expand(N, -1)  # [N, B], agents first

            # GUIDANCE
            b_played = {name: torch.stack([step[name] for step in played]).flatten(0, 1) for name in played[0]}
            x, x_ref = b_played.pop("x"), reference_state(**b_played, **constants)
            g = guidance(x, x_ref, *local_influence(**b_played, **constants), b_actions)  # g_i(a') [N, B, K]
            weights = b_logits.exp() if args.own_action_expectation else F.one_hot(b_actions, g.shape[-1])
            g_mean = (weights * g).sum(-1, keepdim=True)  # E_{a'~π_i} g_i(a'), or g_i of the action taken
            g = g - (g_mean if args.own_action_expectation else g_mean.mean())
            g_std = (weights * g**2).sum(-1).mean().sqrt()
            alpha = (1 - progress) * args.alpha_start + progress * args.alpha_end
            b_advantages = F.one_hot(b_actions, g.shape[-1]) * b_advantages.unsqueeze(-1)  # Â of action a_i [N, B, K]
            b_advantages = (1 - alpha) * b_advantages - alpha * weights * g / (g_std + 1e-8)  # Â ← (1−α) Â − α g

            # UPDATE: minibatches of states, each with the same number of agents, drawn anew
            optimizer.param_groups[0]["lr"] = (1 - args.anneal_lr * progress) * args.learning_rate
            more = explained_variance, deviation(x, x_ref).mean(), g_std
            for _ in range(args.update_epochs):
                for index in torch.randperm(args.num_steps * E).tensor_split(args.num_minibatches):
                    agents = torch.randperm(N)[: args.minibatch_agents] if args.share_parameters else torch.arange(N)
                    sample = agents.unsqueeze(1), index
                    dist = Categorical(logits=actor(b_obs[sample]))
                    old, advantage = b_logits[sample], b_advantages[sample]  # log π_old and Â of every own action
                    logratio = (dist.logits - old).clamp(max=20)  # so that ρ stays finite
                    ratio = logratio.exp()  # ρ = π(a)/π_old(a)
                    # L = −Σ_a min(ρ Â, clip(ρ, 1−ε, 1+ε) Â) (Schulman et al. 2017, eq. 7)
                    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                    policy_loss = torch.max(-advantage * ratio, -advantage * clipped).sum(-1).mean()
                    entropy = dist.entropy().mean()
                    value_loss = F.huber_loss(critic(b_states[..., index, :]), b_returns[..., index], delta=10.0)
                    loss = policy_loss - args.ent_coef * entropy + value_loss
                    optimizer.zero_grad()
                    loss.backward()
                    actor.clip_grad(args.max_grad_norm)
                    critic.clip_grad(args.max_grad_norm)
                    optimizer.step()
                    approx_kl = -(old.exp() * logratio).sum(-1).mean()  # KL(π_old‖π), exactly
                    clipfrac = (old.exp() * ((ratio - 1).abs() > args.clip_coef)).sum(-1).mean()
                    losses.append(torch.stack([value_loss, policy_loss, entropy, approx_kl, clipfrac, *more]).detach())

        # LOG: means over the episode's minibatches
        train_seconds += time.time() - episode_start
        tags = "losses/value_loss losses/policy_loss losses/entropy losses/approx_kl losses/clipfrac "
        tags += "losses/explained_variance guidance/deviation guidance/g_std"
        for tag, value in zip(tags.split(), torch.stack(losses).mean(0).tolist()):
            writer.add_scalar(tag, value, episode)
        writer.add_scalar("charts/episodic_return", episodic_return, episode)
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], episode)
        writer.add_scalar("charts/SPS", episode * T * N / train_seconds, episode)
        writer.add_scalar("guidance/alpha", alpha, episode)
        if time.time() - episode_start > 2:
            print(f"trained for {episode} episodes, return {episodic_return:.2f} in the last one", flush=True)
        if episode // args.eval_every > (episode - E) // args.eval_every or episode == args.episodes:
            measure(episode)
        save_checkpoint(episode)

    writer.close()
    figures = "return={return:.2f} best_fit={best_fit_return:.2f} random={random_return:.2f} score={score:.4f}"
    figures = (figures + " cost_ratio={cost_ratio:.3f} argmax={return_argmax:.2f}").format(**result)
    print(f"final episodes={args.episodes} {figures} seconds={time.time() - start_time:.1f}")
    return result


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
