"""MAPPO (Yu et al. 2022, arXiv 2103.01955) on heterogeneous cloud scheduling: the baseline that DG-PG is built on.

PPO for every agent on one shared reward, with a critic of the global state. Run `python mappo.py --help` for the options.

Letters in shapes: N agents, E environments, T rounds, B = T E states, M servers, K actions, F features.
"""

import contextlib
import ctypes
import functools
import io
import itertools
import math
import os
import pathlib
import platform
import sys
import threading
import time
import zipfile
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.distributions import Categorical, Distribution
from torch.utils.tensorboard import SummaryWriter

from cloud_env import EVAL_SEED, OBS_FEATURES, CloudEnv, best_fit, best_fit_global, evaluate, load_trace, random_policy


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment: workload, initial weights, sampled actions"""
    torch_deterministic: bool = True
    """if toggled, cuDNN uses deterministic algorithms only"""
    cuda: bool = True
    """if toggled, a GPU is used where there is one"""
    save_model: bool = False
    """if toggled, the actor is saved as {exp_name}.pt in the run's folder"""
    init_actor: str | None = None
    """a saved actor to start from, of any number of agents if it is shared"""
    resume: str | None = None
    """the folder of an interrupted run to go on with, under its own options"""

    # the task
    n_agents: int = 50
    """number of agents N, each with one task per round; also the number of servers"""
    rounds: int = 100
    """rounds T of one episode"""
    load: float = 0.8
    """long-run offered load as a fraction of the fleet's capacity"""
    servers_per_agent: int = 8
    """servers K that an agent reaches (at most N)"""
    trace: str | None = None
    """a CSV file of real workload: trains on its first 80 %, evaluates on its last 20 %"""

    # the algorithm
    episodes: int = 1600
    """training episodes, all environments counted"""
    eval_every: int = 80
    """episodes between two evaluations"""
    num_envs: int = 8
    """environments that step together; one update takes an episode of each"""
    share_parameters: bool = True
    """one actor for all agents, or one actor per agent"""
    hidden: int = 32
    """width of the actor's two hidden layers"""
    learning_rate: float = 1e-2
    """Adam's learning rate, actor and critic"""
    anneal_lr: bool = False
    """if toggled, the learning rate falls linearly to 0"""
    gamma: float = 0.97
    """discount factor per round"""
    gae_lambda: float = 0.9
    """λ of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch, each of T E / num_minibatches states"""
    minibatch_agents: int = 50
    """agents that a minibatch draws to train their shared actor (one actor per agent: always all)"""
    update_epochs: int = 10
    """epochs per update"""
    norm_adv: bool = True
    """if toggled, advantages are standardised over the batch"""
    clip_coef: float = 0.2
    """clip range of the policy ratio"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 1.0
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest gradient norm, of each actor and of the critic"""
    target_kl: float | None = None
    """if set, an update ends after the first epoch whose mean approximate KL exceeds it"""


BOUNDS = {
    "seed": (0, 99_999), "rounds": (1, 10**9), "episodes": (0, 10**9), "eval_every": (1, 10**9), "num_envs": (1, 10**4),
    "hidden": (1, 10**5), "learning_rate": (0, 10), "gamma": (0, 1), "gae_lambda": (0, 1), "num_minibatches": (1, 10**9), "minibatch_agents": (1, 10**9),
    "update_epochs": (1, 10**6), "clip_coef": (0, 10), "ent_coef": (0, 10), "vf_coef": (0, 10**6), "max_grad_norm": (0, 10**9),
    "target_kl": (0, 10**9),
}


def check(args):
    """Raises ValueError, naming the option, if one is out of range. The environment and the trace check their own."""
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, not {value}")
    if args.num_minibatches > args.rounds * args.num_envs:
        raise ValueError(f"num_minibatches must be at most rounds x num_envs = {args.rounds * args.num_envs}, not {args.num_minibatches}")
    if args.episodes % args.num_envs:
        raise ValueError(f"episodes must be a multiple of num_envs = {args.num_envs}, not {args.episodes}")


class MLP(nn.Module):
    """`copies` independent networks in -> hidden -> hidden -> 1 as stacked weights, applied by one batched product a layer."""

    def __init__(self, copies, inputs, hidden, output_gain):
        super().__init__()
        self.copies, sizes = copies, [inputs, hidden, hidden, 1]
        self.weights = nn.ParameterList(torch.empty(copies, *shape) for shape in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(copies, 1, size) for size in sizes[1:])
        for stack, gain in zip(self.weights, (np.sqrt(2), np.sqrt(2), output_gain)):
            for weight in stack:
                nn.init.orthogonal_(weight, gain)

    def forward(self, x):
        """x: [N, ..., inputs], N = copies, or any N for one copy. Returns [N, ...]."""
        assert self.copies in (1, x.shape[0]), (self.copies, x.shape)
        h = x.reshape(self.copies, -1, x.shape[-1])
        *layers, (weight, bias) = zip(self.weights, self.biases)
        for hidden_weight, hidden_bias in layers:
            h = torch.baddbmm(hidden_bias, h, hidden_weight).relu_()
        return torch.baddbmm(bias, h, weight).reshape(x.shape[:-1])


class ValueNorm(nn.Module):
    """Mean and standard deviation of the returns, exponentially weighted over updates: the critic learns standard scores."""

    def __init__(self, beta=0.9):
        super().__init__()
        self.beta = beta
        self.register_buffer("totals", torch.zeros(3))  # Σ w, Σ w R, Σ w R² with the weights w = (1 − β) β^age

    def update(self, returns):
        moments = torch.stack([torch.ones_like(returns), returns, returns**2]).flatten(1).mean(1)
        self.totals.lerp_(moments, 1 - self.beta)

    def forward(self):
        """Mean and standard deviation, (0, 1) before the first update."""
        weight, mean, square = self.totals / self.totals[0].clamp(min=1e-8)
        return mean, torch.where(weight > 0, (square - mean**2).clamp(min=1e-4).sqrt(), 1.0)


def gae(rewards, values, gamma, gae_lambda):
    """Generalised advantage estimation of an episode that is cut off by its time limit (Schulman et al. 2016, eq. 16).

    rewards: [T, E]. values: [C, T + 1, E], of every state and the one that the episode was truncated in: the last one is
    bootstrapped from, because no state is terminal. C is the number of critics that see one state, 1 or N.
    Returns advantages [C, T, E].
    """
    deltas = rewards + gamma * values[:, 1:] - values[:, :-1]  # δ_t = r_t + γ V(s_{t+1}) − V(s_t)
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(len(rewards))):
        advantage = deltas[:, t] + gamma * gae_lambda * advantage  # Â_t = δ_t + γλ Â_{t+1}
        advantages[:, t] = advantage
    return advantages


def standardise(x, norm_adv=True):
    return (x - x.mean()) / (x.std(correction=0) + 1e-8) if norm_adv else x


def clipped_policy_loss(advantages, ratio, clip_coef):
    """−min(ρ Â, clip(ρ, 1−ε, 1+ε) Â) of every sample, same shape (Schulman et al. 2017, eq. 7)."""
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))


def load_actor(path, actor):
    """Set the actor's weights from a file that `--save-model` wrote. Raises ValueError, naming the option, if it can't."""
    try:
        actor.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["actor"])
    except Exception as error:  # unreadable, no weights, or weights of other shapes
        raise ValueError(f"init_actor {path} does not fit: {' '.join(str(error).split())}") from None


def load_checkpoint(folder):
    """What `train` saved after an update, and its `Args`. Raises ValueError, naming the option, if it is not whole."""
    try:
        with zipfile.ZipFile(f"{folder}/checkpoint.pt") as file:
            if file.testzip():  # torch does not compare the checksums that it writes
                raise ValueError("its checksum is wrong")
        checkpoint = torch.load(f"{folder}/checkpoint.pt", weights_only=True, map_location="cpu")
        if checkpoint["script"] != os.path.basename(__file__):
            raise ValueError(f"it belongs to {checkpoint['script']}")
        return checkpoint, Args(**checkpoint["args"])
    except Exception as error:
        raise ValueError(f"resume {folder}: no checkpoint to go on with: {' '.join(str(error).split())}") from None


def train(args):
    """Train and evaluate as `args` says. Returns the final line's figures. Raises ValueError on bad options."""
    # set-up: everything that can be wrong with the options is found before anything is written
    checkpoint, folder = None, args.resume
    if folder is not None:
        if args != Args(resume=folder):
            raise ValueError("resume goes on under the run's own options: give no other")
        checkpoint, args = load_checkpoint(folder)
    check(args)
    torch.manual_seed(args.seed)
    Distribution.set_default_validate_args(False)  # its checks take as long as the sampling
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it brings
    if platform.libc_ver()[0] == "glibc":  # keep freed memory: faulting it in again takes a fifth of the time of large batches
        ctypes.CDLL(None).mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    trace = load_trace(args.trace) if args.trace else None
    task = dict(n_agents=args.n_agents, rounds=args.rounds, load=args.load, servers_per_agent=args.servers_per_agent, trace=trace)
    env = CloudEnv(args.num_envs, **task, trace_part=(0, 0.8))
    eval_env = CloudEnv(40 if args.n_agents <= 1000 else 4, **task, trace_part=(0.8, 1))  # 40 scenarios, at once if memory allows
    N, E, T, K, B = args.n_agents, args.num_envs, args.rounds, env.reach.shape[1], args.rounds * args.num_envs

    actor = MLP(1 if args.share_parameters else N, OBS_FEATURES, args.hidden, output_gain=0.01)  # scores a (task, server) row
    critic = MLP(1, 2 * env.n_servers + 2, 64, output_gain=1.0)  # V(s) of the global state
    if args.init_actor and not checkpoint:
        load_actor(args.init_actor, actor)
    actor, critic, value_norm = actor.to(device), critic.to(device), ValueNorm().to(device)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=args.learning_rate, eps=1e-5, fused=True)

    def tensor(array):
        return torch.as_tensor(array, dtype=torch.float32, device=device)

    def critic_input(obs, info):
        return tensor(info["state"]).unsqueeze(0)  # [1, E, 2M + 2]: one value for all agents

    def policy(env, obs, argmax=False):
        """Server numbers [E, N] that the actors choose."""
        with torch.inference_mode():
            logits = actor(tensor(obs).transpose(0, 1))  # [N, E, K]
            actions = logits.argmax(-1) if argmax else Categorical(logits=logits).sample()
        return env.reach[np.arange(N), actions.T.cpu().numpy()]

    parts = {"actor": actor, "critic": critic, "value_norm": value_norm, "optimizer": optimizer}
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
        start, references, result, train_seconds = (checkpoint[name] for name in ("episode", "references", "result", "train_seconds"))
        writer = SummaryWriter(folder, purge_step=start + 1)  # what was logged after the checkpoint is logged again
        train.folder = folder
    else:
        print(f"{args.exp_name}: {N} agents, {env.n_servers} servers, {K} in reach, on {device}; running the reference policies", flush=True)
        references = {"best_fit": best_fit, "best_fit_global": best_fit_global, "random": random_policy}
        if N > 2000:
            del references["best_fit_global"]  # every task against every server takes hours
        references = {name: evaluate(eval_env, reference, EVAL_SEED, 40)[0].mean().item() for name, reference in references.items()}
        print("mean return of " + ", ".join(f"{name} {value:.2f}" for name, value in references.items()))
        start, result, train_seconds, stamp = 0, {}, 0.0, int(time.time())
        while os.path.exists(folder := f"runs/{args.exp_name}__n{N}__{args.seed}__{stamp}"):
            stamp += 1  # two runs never share a folder
        os.makedirs(folder)
        writer = SummaryWriter(folder)
        options = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|option|value|\n|-|-|\n{options}")
    best, worst, start_time = references["best_fit"], references["random"], time.time()

    def save_checkpoint(episode):
        """All that `--resume` needs, written aside and renamed: at any moment there is a whole one."""
        writer.flush()
        checkpoint = {name: part.state_dict() for name, part in parts.items()}
        checkpoint.update(script=os.path.basename(__file__), args=asdict(args), episode=episode, references=references, result=result)
        checkpoint.update(train_seconds=train_seconds, rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state_all())
        data = io.BytesIO()
        torch.save(checkpoint, data)
        pathlib.Path(f"{folder}/checkpoint.new").write_bytes(data.getvalue())
        os.replace(f"{folder}/checkpoint.new", f"{folder}/checkpoint.pt")
        train.folder = folder  # the command line names it on Ctrl-C

    def evaluation(episode):
        """Evaluate the actor on the held-out scenarios, log it under `episode` and print a line."""
        with torch.random.fork_rng():  # the training's random stream goes on as if there had been no evaluation
            torch.manual_seed(args.seed)
            returns, excess = evaluate(eval_env, policy, EVAL_SEED, 40)
        value = returns.mean().item()
        score = (value - worst) / (best - worst) if best != worst else math.nan
        result.update({"return": value, "score": score, "cost_ratio": value / best if best else math.nan})
        if episode == args.episodes:
            argmax = functools.partial(policy, argmax=True)
            result["return_argmax"] = evaluate(eval_env, argmax, EVAL_SEED, 40)[0].mean().item()
        for tag, scalar in {**result, **{f"{name}_return": reference for name, reference in references.items()}}.items():
            writer.add_scalar(f"eval/{tag}", scalar, episode)
        # utilisation minus reference, servers x rounds, CPU left and memory right: red is above, blue below
        excess = np.concatenate([excess[:, :, 0].T, excess[:, :, 1].T], 1)
        image = np.clip(np.stack([1 + excess, 1 - abs(excess), 1 - excess]), 0, 1)
        writer.add_image("eval/utilisation_minus_reference", image, episode)
        sps = episode * T * N / train_seconds if episode else math.nan
        left = (time.time() - start_time) / (episode - start) * (args.episodes - episode) if episode > start else math.nan
        print(f"{episode:8d} {value:10.2f} {score:8.4f} {result['cost_ratio']:10.3f} {sps:9.0f} {left:7.0f}", flush=True)

    print(f"{'episodes':>8} {'return':>10} {'score':>8} {'cost_ratio':>10} {'SPS':>9} {'left_s':>7}")
    if not checkpoint:
        if args.init_actor or not args.episodes:
            evaluation(0)
        save_checkpoint(0)

    # storage of one update
    obs = torch.zeros((N, T, E, K, OBS_FEATURES), device=device)
    actions = torch.zeros((N, T, E), dtype=torch.long, device=device)
    logprobs = torch.zeros((N, T, E), device=device)
    rewards = torch.zeros((T, E), device=device)
    states = torch.zeros((T + 1, *critic_input(*env.reset(seed=0)).shape), device=device)

    for episode in range(start + E, args.episodes + 1, E):  # one update takes an episode of every environment
        update_start = time.time()

        # rollout; an episode's scenario depends on the seed and the episode's number only
        next_obs, info = env.reset(seed=args.seed * 10**6 + episode - E)
        for t in range(T):
            obs[:, t], states[t] = tensor(next_obs).transpose(0, 1), critic_input(next_obs, info)
            with torch.no_grad():
                dist = Categorical(logits=actor(obs[:, t]))
            actions[:, t] = dist.sample()
            logprobs[:, t] = dist.log_prob(actions[:, t])
            next_obs, reward, terminated, truncated, info = env.step(actions[:, t].T.cpu().numpy())
            rewards[t] = tensor(reward)
        assert truncated.all() and not terminated.any()  # the last state has a value: bootstrap from it
        states[T] = critic_input(next_obs, info)

        # advantages, from values in the reward's units
        with torch.no_grad():
            mean, std = value_norm()
            values = critic(states.transpose(0, 1)) * std + mean  # [1, T + 1, E]
            advantages = gae(rewards, values, args.gamma, args.gae_lambda)
            returns = advantages + values[:, :-1]
            explained_variance = 1 - (returns - values[:, :-1]).var(correction=0) / returns.var(correction=0)
            value_norm.update(returns)
            mean, std = value_norm()

        # the batch: B states, agents first
        b_obs, b_actions, b_logprobs = obs.reshape(N, B, K, -1), actions.reshape(N, B), logprobs.reshape(N, B)
        b_states = states[:-1].transpose(0, 1).reshape(states.shape[1], B, -1)
        b_targets = ((returns - mean) / std).reshape(-1, B)
        b_advantages = standardise(advantages, args.norm_adv).reshape(-1, B).expand(N, B)

        # update: minibatches of states, each with the same number of agents, drawn anew
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - (episode - E) / args.episodes) * args.learning_rate
        losses = []
        for _ in range(args.update_epochs):
            for index in torch.randperm(B, device=device).tensor_split(args.num_minibatches):
                drawn = torch.randperm(N, device=device)[: args.minibatch_agents]
                who = (drawn if args.share_parameters else torch.arange(N, device=device)).unsqueeze(1)  # own actors: all, in order
                dist = Categorical(logits=actor(b_obs[who, index]))
                logratio = dist.log_prob(b_actions[who, index]) - b_logprobs[who, index]
                ratio = logratio.exp()
                policy_loss = clipped_policy_loss(b_advantages[who, index], ratio, args.clip_coef).mean()
                entropy = dist.entropy().mean()
                value_loss = F.huber_loss(critic(b_states[:, index]), b_targets[:, index], delta=10.0)
                # a network's loss is the mean over its own samples: for separate networks the sum of N such means
                loss = actor.copies * (policy_loss - args.ent_coef * entropy) + critic.copies * args.vf_coef * value_loss
                optimizer.zero_grad()
                loss.backward()
                norms = [
                    nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm * network.copies**0.5) for network in (actor, critic)
                ]
                optimizer.step()
                with torch.no_grad():
                    approx_kl = (ratio - 1 - logratio).mean()  # http://joschu.net/blog/kl-approx.html
                    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                    losses.append(torch.stack([value_loss, policy_loss, entropy, approx_kl, clipfrac, *norms]))
            if args.target_kl is not None and torch.stack(losses[-args.num_minibatches :])[:, 3].mean() > args.target_kl:
                break

        # log: losses are means over the whole update
        train_seconds += time.time() - update_start
        names = ("value_loss", "policy_loss", "entropy", "approx_kl", "clipfrac", "actor_grad_norm", "critic_grad_norm")
        steps = torch.stack(losses)
        broken = ["reward"] * (not rewards.isfinite().all()) + [names[column] for _, column in (~steps.isfinite()).nonzero().tolist()]
        if broken:
            raise FloatingPointError(f"{broken[0]} is not finite in the update at episode {episode}: {folder}/checkpoint.pt is the one before")
        for name, value in zip(names[:5], steps.mean(0).tolist()):
            writer.add_scalar(f"losses/{name}", value, episode)
        writer.add_scalar("losses/explained_variance", explained_variance.item(), episode)
        writer.add_scalar("charts/episodic_return", rewards.sum(0).mean().item(), episode)
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], episode)
        writer.add_scalar("charts/SPS", episode * T * N / train_seconds, episode)
        if episode // args.eval_every > (episode - E) // args.eval_every or episode == args.episodes:
            evaluation(episode)
        save_checkpoint(episode)

    if args.save_model:
        torch.save({"actor": actor.state_dict(), "args": asdict(args)}, f"{folder}/{args.exp_name}.pt")
        print(f"model saved to {folder}/{args.exp_name}.pt")
    writer.close()
    print(f"final episodes={args.episodes} return={result['return']:.2f} best_fit={best:.2f} random={worst:.2f} "
          f"score={result['score']:.4f} cost_ratio={result['cost_ratio']:.3f} seconds={time.time() - start_time:.1f}")
    return result


def command_line():
    """The options. What tyro finds wrong with them is one line here instead of a box of several."""
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            return tyro.cli(Args)
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
    lines = (line.strip("│ ") for line in box.getvalue().splitlines()[1:])
    raise ValueError(" ".join(itertools.takewhile(lambda line: not line.startswith("─"), lines)))


if __name__ == "__main__":
    script = os.path.basename(__file__)
    threading.excepthook = lambda failure: None  # what fails in the event file's thread is raised again by the next flush
    try:
        train(command_line())
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        folder = getattr(train, "folder", None)
        print(f"{script}: interrupted" + (f", go on with: python {script} --resume {folder}" if folder else ""), file=sys.stderr)
        sys.exit(130)
