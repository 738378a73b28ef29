"""The analytical model of the cloud: what DG-PG knows beside the reward. Differentiable torch functions, no state.

Each function takes what it needs, by name, of what the environment hands out (`info["played"]` and `env.constants`) and
passes over the rest. Letters in shapes: B any leading axes, N agents, K actions, J components that one action touches
(here 1, its server), M components (servers), R quantities of each (here 2: CPU and memory). Yang & Liu 2026,
arXiv 2602.20078.
"""


def local_influence(demand, capacity, reach, **_):
    """z = ∂x/∂a of every action that an agent could take: what its task would add to that server's utilisation.

    demand: [B, N, 2] vCPU and GiB. capacity: [M, 2] vCPU and GiB. reach: [N, K] server numbers.
    Returns z [B, N, K, J, R] and the numbers of the components it is on [B, N, K, J]; elsewhere the influence is zero.
    """
    z = (demand.unsqueeze(-2) / capacity[reach]).unsqueeze(-2)
    return z, reach.unsqueeze(-1).expand(z.shape[:-1])


def system_state(x_before, placement, z, touched):
    """System state x after the joint action, differentiable in the placement.

    x_before: [B, M, R] utilisation before the round. placement: [B, N, K], one-hot or relaxed to weights.
    z: [B, N, K, J, R] and touched: [B, N, K, J] from `local_influence`.
    Returns x = x_before + Σ_i Σ_k placement_ik z_ik, each z_ik on the components that it touches: [B, M, R].
    """
    added = (placement[..., None, None] * z).flatten(-4, -2)  # [B, N K J, R]
    return x_before.scatter_add(-2, touched.flatten(-3).unsqueeze(-1).expand_as(added), added)


def reference_state(offered_load, capacity, **_):
    """Reference state x̃: where the offered load would sit in an efficient system.

    offered_load: L [B, 2] vCPU and GiB present if nothing ever slowed down: exogenous, no policy changes it.
    capacity: [M, 2] vCPU and GiB.
    Returns [B, M, 2], for each resource the minimiser of Σ_n C_n φ(x_n) subject to Σ_n C_n x_n = L, for any strictly
    convex φ. KKT: C_n φ'(x_n) = μ C_n, so φ'(x_n) = μ on every server; φ' is strictly increasing, so all x_n are equal:
    L / ΣC.
    """
    return (offered_load / capacity.sum(0)).unsqueeze(-2).expand(*offered_load.shape[:-1], *capacity.shape)


def deviation(x, x_ref):
    """d(x, x̃) = ½‖x − x̃‖². x, x_ref: [B, M, R] utilisation. Returns [B]."""
    return 0.5 * (x - x_ref).square().sum((-2, -1))
