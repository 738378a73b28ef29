"""The analytical model of the cloud: what DG-PG knows beside the reward (Yang & Liu 2026, arXiv 2602.20078).

x is the utilisation of every server. The model is two functions: x̃, and z, which an action adds to x. The guidance
needs no more, as d = ½‖x − x̃‖² has the gradient ∂d/∂x = x − x̃. Each function takes, by name, what it needs of what
the environment hands out (`info["played"]` and `env.constants`) and passes over the rest. Letters in shapes:
B states, N agents, K actions, J components that one action touches (here 1, its server), M components (servers),
R quantities of each (here 2: CPU and memory).
"""


def local_influence(demand, capacity, reach, **_):
    """z of every action that an agent could take: what its task would add to that server's utilisation.

    demand: [B, N, 2] vCPU and GiB. capacity: [M, 2] vCPU and GiB. reach: [N, K] server numbers.
    Returns z [B, N, K, J, R] and the numbers of the components it is on [B, N, K, J]; elsewhere the influence is zero.
    """
    z = (demand.unsqueeze(-2) / capacity[reach]).unsqueeze(-2)
    return z, reach.unsqueeze(-1).expand(z.shape[:-1])


def reference_state(offered_load, capacity, **_):
    """Reference state x̃: where the offered load would sit in an efficient system.

    offered_load: L [B, 2] vCPU and GiB present if nothing ever slowed down: exogenous, no policy changes it.
    capacity: [M, 2] vCPU and GiB.
    Returns [B, M, 2], for each resource the minimiser of Σ_n C_n φ(x_n) subject to Σ_n C_n x_n = L, for any smooth and
    strictly convex φ. KKT: C_n φ'(x_n) = μ C_n, so φ'(x_n) = μ on every server; φ' is strictly increasing, so all x_n
    are equal: L / ΣC.
    """
    return (offered_load / capacity.sum(0)).unsqueeze(-2).expand(len(offered_load), *capacity.shape)
