"""MAPPO (Yu et al. 2022, arXiv 2103.01955): PPO for all agents, one reward, a critic of the global state.

Trains N agents that share one reward, on heterogeneous cloud scheduling, and measures them on held-out scenarios.

Letters in shapes: N agents, E environments, T rounds, B states of a batch, K actions, F features of an action.
"""

import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter

from cloud_env import CloudEnv, InputError


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment: workload, initial weights, sampled actions
    cuda: bool = False  # train on a GPU if there is one (not measured)
    init_actor: str | None = None  # a run's folder or checkpoint to take the actor from, of any number of agents
    resume: str | None = None  # the folder of an interrupted run to go on with, under its own options
    n_agents: int = 50  # number of agents N, each with one task per round; also the number of servers
    rounds: int = 100  # rounds of one episode
    load: float = 0.8  # offered load as a fraction of the fleet's capacity (of a trace: each episode's mean)
    servers_per_agent: int = 8  # servers K that an agent reaches (N if that is fewer)
    trace: str | None = None  # a CSV file of real workload: trains on its first 80 %, evaluates on its last 20 %
    episodes: int = 1600  # training episodes, all environments counted
    eval_every: int = 80  # episodes between two evaluations
    num_envs: int = 8  # environments E that step together
    num_steps: int = 100  # rounds of every environment per update
    learning_rate: float = 3e-3  # Adam's learning rate, actor and critic
    anneal_lr: bool = False  # let the learning rate fall to 0, like the square of the time left
    gamma: float = 0.97  # discount factor per round
    gae_lambda: float = 0.9  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches per epoch, each of some states
    minibatch_agents: int = 50  # agents that a minibatch draws at random, all if there are fewer
    update_epochs: int = 10  # epochs per update
    clip_coef: float = 0.2  # clip range of the policy ratio
    ent_coef: float = 0.01  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # largest gradient norm, of the actor and of the critic


def cloud(args, num_envs, held_out=False):
    """The environment to train on, or the `held_out` one to evaluate on."""
    return CloudEnv(num_envs, args.n_agents, args.rounds, args.load, args.servers_per_agent, args.trace, held_out)


def network(inputs, hidden, output_gain):
    """inputs -> hidden -> hidden -> one number, with orthogonal weights: [..., inputs] to [...]."""
    layers = [nn.Linear(*size) for size in ((inputs, hidden), (hidden, hidden), (hidden, 1))]
    for layer, gain in zip(layers, (np.sqrt(2), np.sqrt(2), output_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.Flatten(-2))  # the last axis goes


def mean_std(sums):
    """Mean and deviation of returns G, the critic's targets, from decaying sums of 1, G and G²."""
    mean, mean_square = sums[1:] / sums[0]
    return mean, (mean_square - mean**2).clamp(min=1e-4).sqrt()


def gae(rewards, values, gamma, gae_lambda):
    """Generalised advantages [T, ...] of rewards [T, ...] and values [T + 1, ...] (Schulman et al. 2016, eq. 16)."""
    delta = rewards + gamma * values[1:] - values[:-1]  # δ_t = r_t + γ V(s_{t+1}) − V(s_t): no state is terminal
    advantages = torch.zeros_like(values)
    for t in reversed(range(len(rewards))):
        advantages[t] = delta[t] + gamma * gae_lambda * advantages[t + 1]  # Â_t = δ_t + γλ Â_{t+1}
    return advantages[:-1]


def evaluate(env, policy):
    """Mean undiscounted return of `policy`, observations to actions [E, N], on the held-out scenarios."""
    obs, _ = env.reset(seed=10**12)  # training scenarios have smaller seeds
    returns = 0
    for _ in range(env.rounds):
        obs, reward, _, _, _ = env.step(policy(obs))
        returns += reward
    return returns.mean().item()


def train(args, make_env=cloud):
    """Train and evaluate as `args` says. Returns the last evaluation's figures. Raises InputError on bad options.

    make_env: like `cloud`, makes an environment with what is used of `CloudEnv` here.
    """
    # SET-UP: nothing is written before all options are known to be good
    start_time = time.time()
    script = os.path.basename(__file__)
    path = args.init_actor if args.resume is None else args.resume
    if path is not None:
        file = f"{path}/checkpoint.pt" if os.path.isdir(path) else path
        try:
            saved = dict(torch.load(file, weights_only=True, map_location="cpu"))
        except Exception as error:
            raise InputError(f"{file} is no checkpoint: {type(error).__name__}") from None
    if args.resume is not None:
        given = [name for name, default in vars(type(args)(resume=path)).items() if getattr(args, name) != default]
        if given or not os.path.isdir(path) or saved.get("script") != script or [*vars(args)] != [*saved["args"]]:
            raise InputError(f"resume: {path} must be the folder of a run of {script}, without {given or 'options'}")
        args = type(args)(**saved["args"] | {"resume": path})
    for low, high, names in (
        (1, 10**9, "eval_every num_envs num_steps num_minibatches minibatch_agents update_epochs"),
        (0, 99_999, "seed episodes clip_coef ent_coef max_grad_norm"),
        (0, 1, "learning_rate gamma gae_lambda"),
    ):
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                raise InputError(f"{name} must be from {low} to {high}, not {getattr(args, name)}")
    if args.episodes % args.num_envs:
        raise InputError(f"episodes = {args.episodes} is no multiple of num_envs = {args.num_envs}")

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    env = make_env(args, args.num_envs)
    eval_env = make_env(args, min(40, int(np.ceil(2_000 / args.n_agents))), held_out=True)  # fewer do for large N
    next_obs, info = env.reset(seed=0)  # for the sizes
    E, N, K, F = next_obs.shape
    actor = network(F, 32, 0.01).to(device)  # for all agents: the logit of an action, from its features
    critic = network(info["state"].shape[-1], 64, 1.0).to(device)  # V(s) of the global state
    critic.register_buffer("sums", torch.tensor([1e-8, 0, 1e-8], device=device))  # at first mean 0, deviation 1
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], args.learning_rate, eps=1e-5, fused=True)
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer}
    if path is not None:
        if saved.get("system") != type(env).__name__:
            raise InputError(f"{file} is a run on {saved.get('system')}, not on {type(env).__name__}")
        for name in ["actor"] if args.resume is None else parts:
            parts[name].load_state_dict(saved[name])
    start = 0 if args.resume is None else saved["episode"]

    @torch.no_grad()
    def pi(obs):  # π(·|o) of all agents
        return Categorical(logits=actor(torch.tensor(obs, device=device)), validate_args=False)

    folder = args.resume or f"runs/{args.exp_name}__n{N}__{args.seed}__{time.time_ns()}"
    with SummaryWriter(folder, purge_step=start + 1) as writer:  # what follows the checkpoint is logged again
        writer.add_text("hyperparameters", str(args))
        print(f"{folder}: {args.episodes} episodes of {N} agents with {K} actions, {device}; {env}")
        result = {"heuristic": evaluate(eval_env, lambda obs: eval_env.heuristic())}
        print(f"return of the heuristic: {result['heuristic']:.2f}; {eval_env}")
        result["random"] = evaluate(eval_env, lambda obs: torch.randint(K, obs.shape[:2]).numpy())
        print(f"return of random actions: {result['random']:.2f}")
        for episode in range(start, args.episodes + 1, E):  # episodes done; the last pass only evaluates
            # EVALUATE at the end, and when eval_every episodes have passed
            if episode == args.episodes or (0 < episode and episode % args.eval_every < E):
                torch.manual_seed(args.seed)
                result["return"] = evaluate(eval_env, lambda obs: pi(obs).sample().cpu().numpy())
                result["cost_ratio"] = result["return"] / result["heuristic"] if result["heuristic"] else np.nan
                if episode == args.episodes:
                    result["argmax"] = evaluate(eval_env, lambda obs: pi(obs).logits.argmax(-1).cpu().numpy())
                for name, value in result.items():
                    writer.add_scalar(f"eval/{name}", value, episode)
                figures = " ".join(f"{name}={value:.3f}" for name, value in result.items())
                print(f"episodes={episode} {figures} seconds={time.time() - start_time:.1f}")
            if episode == args.episodes:
                return result

            episodic_return = 0
            log = defaultdict(list)  # the episode's values by their tags
            seed = args.seed * 10**6 + episode  # whatever came before: a resumed run draws the same
            torch.manual_seed(seed)
            next_obs, info = env.reset(seed=seed)
            for first in range(0, env.rounds, args.num_steps):  # an update takes the next num_steps rounds
                progress = (episode + first / env.rounds * E) / args.episodes  # from 0 to 1

                # ROLLOUT
                steps, states, rewards = [], [], []
                for _ in range(first, min(first + args.num_steps, env.rounds)):
                    dist = pi(next_obs)
                    actions = dist.sample()
                    steps.append((torch.tensor(next_obs, device=device), actions, dist.log_prob(actions)))
                    states.append(torch.tensor(info["state"], device=device))
                    next_obs, reward, _, _, info = env.step(actions.cpu().numpy().copy())  # it may change them
                    rewards.append(torch.tensor(reward, device=device))
                states.append(torch.tensor(info["state"], device=device))  # the last one is bootstrapped from
                episodic_return += sum(rewards).mean().item()

                # ADVANTAGES, from values in the reward's units
                mean, std = mean_std(critic.sums)
                values = critic(torch.stack(states)).detach() * std + mean  # [num_steps + 1, E]
                advantages = gae(torch.stack(rewards), values, args.gamma, args.gae_lambda)
                returns = advantages + values[:-1]
                unexplained = advantages.var(correction=0) / (returns.var(correction=0) + 1e-8)
                log["losses/explained_variance"].append(1 - unexplained.item())
                critic.sums.lerp_(torch.stack([(returns**k).mean() for k in range(3)]), 0.1)  # 1, G, G²
                mean, std = mean_std(critic.sums)
                b_obs, b_actions, b_logprobs = map(torch.cat, zip(*steps))  # [B, N, …]
                b_states = torch.cat(states[:-1])
                b_returns = ((returns - mean) / std).flatten(0, 1)
                advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
                b_advantages = advantages.view(len(b_obs), -1).expand(-1, N)  # the same for all agents

                # UPDATE: minibatches share out the states, and draw their agents anew
                optimizer.param_groups[0]["lr"] = (1 - args.anneal_lr * progress) ** 2 * args.learning_rate
                log["charts/learning_rate"].append(optimizer.param_groups[0]["lr"])
                for _ in range(args.update_epochs):
                    for index in torch.randperm(len(b_obs)).chunk(args.num_minibatches):
                        sample = index.unsqueeze(1), torch.randperm(N)[: args.minibatch_agents]
                        dist = Categorical(logits=actor(b_obs[sample]), validate_args=False)
                        logratio = dist.log_prob(b_actions[sample]) - b_logprobs[sample]
                        ratio = logratio.exp()  # ρ = π(a)/π_old(a)
                        # L = −min(ρ Â, clip(ρ, 1−ε, 1+ε) Â) (Schulman et al. 2017, eq. 7)
                        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                        advantage = b_advantages[sample]
                        policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                        entropy = dist.entropy().mean()
                        value_loss = nn.functional.huber_loss(critic(b_states[index]), b_returns[index], delta=10.0)
                        optimizer.zero_grad()
                        (policy_loss - args.ent_coef * entropy + value_loss).backward()
                        for net in (actor, critic):
                            nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm, error_if_nonfinite=True)
                        optimizer.step()
                        log["losses/value_loss"].append(value_loss.item())
                        log["losses/policy_loss"].append(policy_loss.item())
                        log["losses/entropy"].append(entropy.item())
                        log["losses/approx_kl"].append((ratio - 1 - logratio).mean().item())
                        log["losses/clipfrac"].append((ratio != clipped).float().mean().item())

            # LOG means over the episode
            done = episode + E
            for tag, values in log.items():
                writer.add_scalar(tag, np.mean(values), done)
            writer.add_scalar("charts/episodic_return", episodic_return, done)
            writer.add_scalar("charts/SPS", (done - start) * env.rounds * N / (time.time() - start_time), done)
            writer.flush()
            print(f"episodes={done} training_return={episodic_return:.2f}")

            # SAVE: renamed into place, so that there is a whole checkpoint at any moment
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= dict(script=script, system=type(env).__name__, args=asdict(args), episode=done)
            torch.save(state, f"{folder}/checkpoint.new")
            os.replace(f"{folder}/checkpoint.new", f"{folder}/checkpoint.pt")


def main(args=Args, *system):
    """`train`, with options of the class `args` from the command line. Bad input: one line on stderr and status 1."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # not every terminal has these letters
    torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it brings
    try:
        train(tyro.cli(args, description=sys.modules["__main__"].__doc__), *system)
    except (InputError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
