"""The analytical model of the cloud: what DG-PG knows beside the reward. Differentiable torch functions, no state.

Letters in shapes: B any leading axes, N agents, M servers, K reachable servers per agent; the last axis of size 2 is
(CPU, memory). Yang & Liu 2026, arXiv 2602.20078.
"""

import torch


def local_influence(demand, capacity, reach):
    """z = ∂x/∂a of every action that an agent could take: what its task would add to that server's utilisation.

    demand: [..., N, 2] vCPU and GiB. capacity: [M, 2] vCPU and GiB. reach: [N, K] server numbers.
    Returns [..., N, K, 2]; on all other servers the influence is zero.
    """
    return demand.unsqueeze(-2) / capacity[reach]


def system_state(x_before, placement, z, reach):
    """System state x after the joint action, differentiable in the placement.

    x_before: [B, M, 2] utilisation before the round. placement: [B, N, K], one-hot or relaxed to weights.
    z: [B, N, K, 2] from `local_influence`. reach: [N, K] server numbers.
    Returns x = x_before + Σ_i Σ_k placement_ik z_ik, each z_ik at server reach_ik: [B, M, 2] utilisation.
    """
    added = (placement.unsqueeze(-1) * z).flatten(-3, -2)  # [B, N K, 2]
    return x_before.index_add(-2, reach.flatten(), added)


def reference_state(load, capacity):
    """Reference state x̃: where the offered load would sit in an efficient system.

    load: [B, 2] offered load L, vCPU and GiB present if nothing ever slowed down: exogenous, no policy changes it.
    capacity: [M, 2] vCPU and GiB.
    Returns [B, M, 2], the minimiser per resource of Σ_n C_n φ(x_n) subject to Σ_n C_n x_n = L for any strictly convex φ.
    KKT: C_n φ'(x_n) = μ C_n, so φ'(x_n) = μ on every server, and as φ' is strictly increasing all x_n are equal: L / ΣC.
    """
    return (load / capacity.sum(0)).unsqueeze(-2).expand(*load.shape[:-1], *capacity.shape)


def deviation(x, x_ref):
    """d(x, x̃) = ½‖x − x̃‖². x, x_ref: [B, M, 2] utilisation. Returns [B]."""
    return 0.5 * (x - x_ref).square().sum((-2, -1))
