# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "torch==2.13.0", "verl==0.9.1", "tensordict==0.10.0", "ray==2.60.0", "transformers==5.10.4",
#     "hydra-core==1.3.8", "omegaconf==2.3.1", "accelerate==1.15.0", "datasets==5.2.0",
#     "peft==0.21.2", "pyarrow==26.0.1", "pandas==3.1.1", "codetiming==1.4.0", "dill==0.4.1",
#     "pylatexenc==2.11", "pybind11==3.1.0", "torchdata==0.11.0", "packaging==25.0", "numpy==2.4.6",
# ]
# ///
"""verl's policy losses, means over tokens, KL estimates, advantages and overlong punishment.

The functions of verl.trainer.ppo.core_algos in float64, and DAPORewardManager on made-up replies.
verl 0.9.1 is installed without its own dependencies (`pip install --no-deps verl==0.9.1`) beside
those named above, which its import asks for.
"""

import types

import draws
import numpy as np
import torch
import transformers
import verl
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import FSDPActorConfig
from verl.workers.reward_manager.dapo import DAPORewardManager

LIMIT = 12  # loss_scale_factor
CLIP = dict(clip_ratio_low=0.2, clip_ratio_high=0.28)
DUAL = CLIP | dict(clip_ratio_c=3.0)
NARROW = dict(clip_ratio_low=0.1, clip_ratio_high=0.15)
MEAN, SUM, NORM = "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
SETTINGS = {
    "vanilla": dict(loss="vanilla", mode="token-mean", clip_ratio_c=1e9, **CLIP),
    "vanilla_dual": dict(loss="vanilla", mode="token-mean", **DUAL),
    "vanilla_sequence": dict(loss="vanilla", mode=MEAN, **DUAL),
    "vanilla_sum": dict(loss="vanilla", mode=SUM, **DUAL),
    "vanilla_norm": dict(loss="vanilla", mode=NORM, **DUAL),
    "vanilla_groups": dict(loss="vanilla", mode="token-mean", groups=True, **DUAL),
    "vanilla_weights": dict(loss="vanilla", mode="token-mean", cap=2.0, **DUAL),
    "vanilla_entropy": dict(loss="vanilla", mode=MEAN, entropy_coef=0.05, **DUAL),
    "gspo": dict(loss="gspo", mode=MEAN, **NARROW),
    "gspo_tokens": dict(loss="gspo", mode="token-mean", **NARROW),
    "cispo": dict(loss="cispo", mode="token-mean", clip_ratio_low=0.3, clip_ratio_high=0.5),
    "cispo_upper": dict(loss="cispo", mode="token-mean", clip_ratio_low=1.0, clip_ratio_high=4.0),
    "kl_k1": dict(loss="vanilla", mode="token-mean", kl="k1", kl_coef=0.3, **DUAL),
    "kl_k2": dict(loss="vanilla", mode="token-mean", kl="k2", kl_coef=0.3, **DUAL),
    "kl_k3": dict(loss="vanilla", mode="token-mean", kl="k3", kl_coef=0.3, **DUAL),
    "kl_k3_sequence": dict(loss="vanilla", mode=MEAN, kl="low_var_kl", kl_coef=0.3, **DUAL),
}


def double(x):
    return torch.as_tensor(np.asarray(x, np.float64))


def loss(draw, settings):
    """(loss, gradient to logp, gradient to entropy) of one draw, [row, token].

    The terms are put together as verl's actor does: each averaged alone, then added.
    """
    if settings.get("groups"):  # the mean over groups of each group's token mean
        rows = np.split(np.arange(len(draw["adv"])), len(draw["adv"]) // draws.GROUP)
        each = [loss({k: v[r] for k, v in draw.items()}, settings | {"groups": 0}) for r in rows]
        value, *grads = zip(*each)
        return np.mean(value), *(np.concatenate(g) / len(rows) for g in grads)
    mode, mask = settings["mode"], double(draw["mask"])
    logp, entropy = double(draw["logp"]).requires_grad_(), double(draw["entropy"]).requires_grad_()
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=settings["clip_ratio_low"],
        clip_ratio_high=settings["clip_ratio_high"],
        clip_ratio_c=settings.get("clip_ratio_c", 3.0),
    )
    info = {"loss_scale_factor": LIMIT} if mode == NORM else {}
    config.global_batch_info.update(info)
    weights, old = None, double(draw["old"])
    if cap := settings.get("cap"):  # verl has no rule for NaN: the ratio given to it is 1 there
        diff = double(draw["old"]) - double(draw["sampled"])
        diff = torch.where(torch.isnan(diff), 0.0, diff)
        weights, _ = compute_rollout_correction_weights(diff, mask, "token", cap)
    adv = double(draw["adv"])[:, None].expand_as(mask)
    function = core_algos.get_policy_loss_fn(settings["loss"])
    value, _ = function(old, logp, adv, mask, mode, config, weights)
    aggregate = lambda x: core_algos.agg_loss(x, mask, mode, **info)
    if kind := settings.get("kl"):
        penalty = core_algos.kl_penalty(logp, double(draw["ref"]), kind)
        value = value + settings["kl_coef"] * aggregate(penalty)
    if coef := settings.get("entropy_coef"):
        value = value - coef * aggregate(entropy)
    value.backward()
    still = 0.0 if entropy.grad is None else entropy.grad.numpy()
    return value.item(), logp.grad.numpy(), np.zeros(mask.shape) + still


def draw_of(inputs, d):
    rows, tokens = inputs["rows"][d], inputs["tokens"][d]
    cut = lambda x: x[d, :rows, :tokens] if x.ndim == 3 else x[d, :rows]
    return {k: cut(v) for k, v in inputs.items() if k not in ("rows", "tokens")}


def advantages(inputs, *, by_std=True, group=draws.GROUP):
    out = np.zeros(inputs["reward"].shape)
    for d in range(draws.DRAWS):
        reward = double(inputs["reward"][d, : inputs["rows"][d], None])
        found, _ = core_algos.compute_grpo_outcome_advantage(
            reward,
            torch.ones_like(reward),
            np.arange(len(reward)) // group,
            norm_adv_by_std_in_grpo=by_std,
        )
        out[d, : len(reward)] = found[:, 0]
    return {"value": out}


def overlong(lengths, limit, buffer, factor):
    """What DAPORewardManager pays for replies of score 0; length 1 to `limit`."""
    cfg = OmegaConf.create({"enable": True, "len": buffer, "penalty_factor": factor, "log": False})
    tokenizer = types.SimpleNamespace(decode=lambda *a, **k: "reply", eos_token="<eos>")
    manager = DAPORewardManager(
        tokenizer, 0, lambda **k: 0.0, max_resp_len=limit, overlong_buffer_cfg=cfg
    )
    n, width = len(lengths), int(max(lengths))
    mask = (np.arange(width)[None] < lengths[:, None]).astype(np.int64)
    data = DataProto.from_dict(
        tensors={
            "prompts": torch.ones(n, 1, dtype=torch.long),
            "responses": torch.ones(n, width, dtype=torch.long),
            "attention_mask": torch.as_tensor(np.concatenate([np.ones((n, 1), int), mask], 1)),
        },
        non_tensors={
            "reward_model": np.array([{"ground_truth": ""}] * n, object),
            "data_source": np.array(["none"] * n, object),
            "extra_info": np.array([{} for _ in range(n)], object),
        },
    )
    return manager(data).sum(1).numpy()


def main():
    inputs, cases = draws.policy(), {}
    for name, settings in SETTINGS.items():
        values, shape = np.zeros(draws.DRAWS), inputs["logp"].shape
        grads, entropy = np.zeros(shape), np.zeros(shape)
        for d in range(draws.DRAWS):
            at = d, slice(inputs["rows"][d]), slice(inputs["tokens"][d])
            values[d], grads[at], entropy[at] = loss(draw_of(inputs, d), settings)
        found = {"value": values, "grad": grads}
        cases[name] = settings, found | ({"entropy_grad": entropy} if entropy.any() else {})
    cases["advantages"] = dict(epsilon=1e-6), advantages(inputs)
    cases["advantages_no_std"] = (
        dict(norm_adv_by_std_in_grpo=False),
        advantages(inputs, by_std=False),
    )
    cases["advantages_alone"] = dict(group=1), advantages(inputs, group=1)
    nan = inputs | {"reward": np.where(np.arange(draws.ROWS) == 1, np.nan, inputs["reward"])}
    cases["advantages_nan"] = dict(nan="row 1"), advantages(nan)
    value, grad, _ = loss(draws.far(), dict(SETTINGS["vanilla"]))
    cases["vanilla_far"] = SETTINGS["vanilla"], {"value": value, "grad": grad}
    for kind in ("k1", "k2", "k3"):
        logp = double(draws.FAR).requires_grad_()
        value = core_algos.kl_penalty(logp, torch.zeros_like(logp), kind)
        value.sum().backward()
        found = {"value": value.detach().numpy(), "grad": logp.grad.numpy()}
        cases[f"kl_far_{kind}"] = dict(kl_penalty=kind, ref=0.0), found
    rng = np.random.default_rng(7)
    lengths = np.concatenate([[1, 30, 31, 39, 40], rng.integers(1, 41, 20)])
    found = {"lengths": lengths, "value": overlong(lengths, 40, 10, 0.7)}
    cases["overlong"] = dict(max_resp_len=40, len=10, penalty_factor=0.7), found
    versions = {m.__name__: m.__version__ for m in (verl, torch, transformers)}
    draws.save("verl_policy", "verl core_algos", versions, inputs, cases)


main()
