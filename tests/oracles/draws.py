"""The random inputs that every peer is asked about, and how an answer is stored. Numpy only.

Draws are padded to one shape, so that the tests compile once; a peer sees a draw cut to its own
size. All numbers are float32 exactly, so that a test in float32 starts from the peer's inputs.
"""

import json
import pathlib
import platform

import numpy as np

DRAWS, GROUP, ROWS, TOKENS = 24, 4, 8, 6
PAIRS = 4
HERE = pathlib.Path(__file__).parent
MASKED = (20, 21, 22, 23)  # draws in which one response has no token that counts


def policy():
    """Arrays [draw, row, token] of responses, `GROUP` rows to a group; `reward` [draw, row].

    Log-ratios have sigma 0.05 to 2; `ref` stays within 2.3 of logp, below the clamp of verl's k3.
    Groups: of equal rewards (draw 3 and 4), otherwise graded or binary. `rows`, `tokens`: the size.
    """
    rng = np.random.default_rng(2024)
    out = {}
    shape = (DRAWS, ROWS, TOKENS)
    sigma = np.geomspace(0.05, 2.0, DRAWS)[rng.permutation(DRAWS), None, None]
    out["logp"] = -rng.exponential(1.0, shape)
    out["old"] = out["logp"] - sigma * rng.normal(size=shape)
    out["ref"] = out["logp"] + np.clip(sigma * rng.normal(size=shape), -2.3, 2.3)
    out["sampled"] = out["old"] - 0.5 * rng.normal(size=shape)
    out["sampled"][rng.random(shape) < 0.1] = np.nan
    out["entropy"] = rng.exponential(1.0, shape)
    out = {name: x.astype(np.float32) for name, x in out.items()}
    rows = rng.choice([GROUP, 2 * GROUP], DRAWS)
    rows[list(MASKED)] = 2 * GROUP
    tokens = rng.integers(1, TOKENS + 1, DRAWS)
    tokens[list(MASKED)] = TOKENS
    length = np.minimum(rng.integers(1, TOKENS + 1, (DRAWS, ROWS)), tokens[:, None])
    for draw in MASKED:
        length[draw, rng.integers(ROWS)] = 0
    mask = np.arange(TOKENS)[None, None] < length[..., None]
    out["mask"] = mask & (np.arange(ROWS)[None, :, None] < rows[:, None, None])
    binary = rng.integers(0, 2, (DRAWS, ROWS)).astype(float)
    reward = np.where(rng.random(DRAWS)[:, None] < 0.5, binary, rng.normal(size=(DRAWS, ROWS)))
    reward[3], reward[4] = 1.0, np.repeat([0.3, 0.7], GROUP)
    out["reward"] = reward.astype(np.float32)
    adv = rng.normal(size=(DRAWS, ROWS))
    adv[3, :GROUP] = 0.0  # a group without signal
    out["adv"] = adv.astype(np.float32)
    return out | {"rows": rows, "tokens": tokens}


FAR = np.linspace(-30.0, 30.0, 41)  # log-ratios past every clamp, and on none of them


def far():
    """One draw of two rows, of advantage 1 and -1, whose log-ratios are FAR."""
    rows = lambda x: np.array([np.broadcast_to(x, FAR.shape)] * 2)
    return {
        "logp": rows(FAR),
        "adv": np.array([1.0, -1.0]),
        "mask": rows(True),
    } | {name: rows(0.0) for name in ("old", "ref", "sampled", "entropy")}


def pairs():
    """Arrays [draw, pair, side, token] of pairs; side 0 is chosen, 1 rejected; `pairs` how many."""
    rng = np.random.default_rng(2025)
    shape = (DRAWS, PAIRS, 2, TOKENS)
    sigma = np.geomspace(0.05, 2.0, DRAWS)[rng.permutation(DRAWS), None, None, None]
    logp = -rng.exponential(1.0, shape)
    out = {"logp": logp, "ref": logp - sigma * rng.normal(size=shape)}
    out = {name: x.astype(np.float32) for name, x in out.items()}
    count = rng.integers(1, PAIRS + 1, DRAWS)
    length = rng.integers(1, TOKENS + 1, (DRAWS, PAIRS, 2))
    mask = np.arange(TOKENS)[None, None, None] < length[..., None]
    out["mask"] = mask & (np.arange(PAIRS)[None, :, None, None] < count[:, None, None, None])
    return out | {"pairs": count}


def save(name, peer, versions, inputs, cases, notes=()):
    """Write NAME.npz. `cases`: name -> (settings, {"value": [draw], "grad": as the inputs})."""
    meta = {
        "peer": peer,
        "versions": versions | {"python": platform.python_version(), "numpy": np.__version__},
        "settings": {case: settings for case, (settings, _) in cases.items()},
        "notes": list(notes),
    }
    arrays = {f"inputs/{k}": v for k, v in inputs.items()}
    for case, (_, found) in cases.items():
        arrays |= {f"{case}/{k}": np.asarray(v) for k, v in found.items()}
    np.savez_compressed(HERE / f"{name}.npz", meta=np.array(json.dumps(meta)), **arrays)
    print(name, f"{(HERE / f'{name}.npz').stat().st_size / 1024:.0f} KiB,", len(cases), "cases")
