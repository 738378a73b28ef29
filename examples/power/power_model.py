"""Valley filling: where the energy of a night's cars would go if it could be poured over its slots like water.

B states, N agents, K plans, H slots, G transformers. The 1 + G rows are the feeder and the transformers; component
row H + slot is a row's load in a slot, per rating and times the row's weight.
"""

import torch


def local_influence(power, start, length, rating, weight, transformer, base, **_):
    """z = weight power / rating, in each of a plan's slots, on the feeder and on the agent's transformer.

    power [B, N] kW, start [B, N, K] and length [B, N] slots, rating and weight [1 + G], transformer [N], base
    [B, 1 + G, H]. Returns z [B, N, K, J, 1] and touched [B, N, K, J], J twice the slots of the longest plan.
    """
    offset = torch.arange(int(length.max()))
    on = offset < length[..., None, None]  # [B, N, 1, J/2]; shorter plans are padded with z = 0 on their first slot
    slot = start.unsqueeze(-1) + offset * on
    row = 1 + transformer.view(-1, 1, 1)
    z = [(power[..., None, None] * on * weight[r] / rating[r]).expand(slot.shape) for r in (0, row)]
    return torch.cat(z, -1).unsqueeze(-1), torch.cat([slot, row * base.shape[-1] + slot], -1)


def reference_state(base, energy, weight, **_):
    """x̃ [B, (1 + G) H, 1], in each row the least Σ_h φ(x_h), φ convex, s.t. x ≥ base, Σ_h (x_h − base_h) = energy.

    KKT: x̃_h = max(base_h, μ) at the water level μ with Σ_h max(μ − base_h, 0) = energy. With the k lowest slots alone
    the level would be (energy + Σ_{j≤k} base_(j)) / k ≥ μ, and it is μ where they are those below μ: μ is the least.
    base [B, 1 + G, H] load without cars, energy [B, 1 + G] of all cars so far: exogenous, no plan changes them.
    """
    filled = energy.unsqueeze(-1) + base.sort(-1).values.cumsum(-1)
    level = (filled / torch.arange(1, base.shape[-1] + 1)).amin(-1, keepdim=True)
    return (torch.maximum(base, level) * weight.unsqueeze(-1)).flatten(-2).unsqueeze(-1)
