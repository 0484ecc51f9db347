"""What a policy update reports of its replies and of its pairs. Names as TRL's where it has one."""

import numpy as np
from jaxtyping import Bool

from jaxvid.ops.duality import Advantages
from jaxvid.train.groups import SIDES, Replies, Settings, paid


def replies(seen: Replies, settings: Settings) -> dict[str, float]:
    """Rewards and lengths of every reply sampled, before the filter: the filter would flatter."""
    asked = seen.asked
    if not asked.any():  # every group was lost to a fault
        return {"reward": np.nan, "rewards/format/mean": np.nan}
    totals = paid(seen, settings)[asked]  # [groups, G]
    length, ended = seen.length[asked], seen.ended[asked]
    out = {
        "reward": totals.mean(),
        "reward_std": totals.std(-1, ddof=1).mean(),
        "frac_reward_zero_std": (totals.max(-1) == totals.min(-1)).mean(),
        "completions/mean_length": length.mean(),
        "completions/min_length": length.min(),
        "completions/max_length": length.max(),
        "completions/clipped_ratio": 1 - ended.mean(),
    }
    if ended.any():
        terminated = length[ended]
        out["completions/mean_terminated_length"] = terminated.mean()
        out["completions/min_terminated_length"] = terminated.min()
        out["completions/max_terminated_length"] = terminated.max()
    for name in ("format", "correct"):
        values = getattr(seen, name)
        if np.isnan(values[asked]).all():
            continue  # a reward that does not say what is right
        out[f"rewards/{name}/mean"] = values[asked].mean()
        out[f"rewards/{name}/std"] = values[asked].std()
        for side, label in enumerate(SIDES):
            if asked[:, side].any():
                out[f"rewards/{name}/{label}"] = values[asked[:, side], side].mean()
    if asked.all(1).any():
        out["pair/both_correct"] = seen.correct[asked.all(1)].min(1).mean()
    named: dict[str, list[float]] = {}
    for i, side in np.argwhere(asked):
        for parts in seen.parts[i][side]:
            for name, value in parts.items():
                named.setdefault(name, []).append(value)
    for name, values in named.items():
        out |= {f"rewards/{name}/mean": np.mean(values), f"rewards/{name}/std": np.std(values)}
    return {name: float(x) for name, x in out.items()}


def pairs(found: Advantages, valid: Bool[np.ndarray, "pairs 2 G"]) -> dict[str, float]:
    """Signal S, scale alpha, dead and lonely groups of the pairs kept (DNA-Train, eq. of sec. 4.3).

    S is before the norm. alpha is over the groups that take part. `dead` is the share of groups
    without signal, of those asked; `lonely` the share of pairs of which one group alone has some.
    """
    if not len(valid):
        return {}
    out, there = {}, valid.any(-1)
    for side, label in enumerate(("real", "cf")):
        alpha, asked = found.alpha[:, side], there[:, side]
        if asked.any():
            out[f"pair/S_{label}"] = found.signal[asked, side].mean()
            out[f"pair/dead_{label}"] = found.dead[asked, side].mean()
        if (alpha > 0).any():
            out[f"pair/alpha_{label}"] = alpha[alpha > 0].mean()
            out[f"pair/alpha_{label}_max"] = alpha.max()
    out["pair/dead"] = found.dead[there].mean()
    out["pair/lonely"] = ((there & ~found.dead).sum(1) == 1).mean()
    return {name: float(x) for name, x in out.items()}
