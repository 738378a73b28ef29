"""The system optimum of a road network: where all vehicles on the way would drive to lose the least time in all."""

import torch


def local_influence(fleet, routes, on, unit, **_):
    """z: a fleet's flow per unit, on every link of the route. routes, on: [N, K, J]. fleet: [B, N] vehicles/h."""
    z = fleet[..., None, None] * on / unit[routes]
    return z.unsqueeze(-1), routes.expand(z.shape)


def assignment(trips, ends, capacity, free_time, weight=5, steps=50):
    """Link flows [B, L] of trips [B, zones, zones] that all take routes of least cost t0 (1 + 0.15 weight (v/c)^4).

    Weight 5 is the marginal cost d/dv v t(v): the system optimum, least Σ v t(v). Weight 1: the user equilibrium.
    Frank-Wolfe: v moves towards the flows on the routes that are cheapest now. By the envelope theorem these are the
    gradient of Σ trips x least cost, and no route needs to be known.
    """
    flow = trips.new_zeros(len(trips), len(capacity))
    for step in range(steps):
        cost = (free_time * (1 + 0.15 * weight * (flow / capacity) ** 4)).requires_grad_()
        least = torch.full_like(trips, torch.inf).masked_fill(torch.eye(trips.shape[-1], dtype=bool), 0)
        least[:, ends[:, 0], ends[:, 1]] = cost
        for via in range(trips.shape[-1]):  # Floyd and Warshall
            least = torch.minimum(least, least[:, :, via, None] + least[:, None, via])
        (cheapest,) = torch.autograd.grad((trips * least).sum(), cost)
        flow = flow + 2 / (step + 2) * (cheapest - flow)
    return flow


def reference_state(present, pair, ends, capacity, free_time, unit, **_):
    """x̃ [B, L, 1]: nearly the system optimum of all vehicles on the way, present [B, N] per h, if all started anew."""
    trips = present.new_zeros(len(present), 24 * 24).index_add(1, pair, present).unflatten(1, (24, 24))
    return (assignment(trips, ends, capacity, free_time) / unit).unsqueeze(-1)
