# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0",
#     "datasets==5.2.0", "numpy==2.4.6",
# ]
# ///
"""TRL's policy losses, advantages and importance weights: two methods of GRPOTrainer.

Both are called unbound, on a stub of the trainer. `_compute_loss` runs in float64 on drawn
log-probs. `_generate_and_score_completions` gives advantages and importance weights: its sampler,
rewards and old log-probs are the drawn ones.
"""

import types
from collections import defaultdict
from unittest import mock

import draws
import numpy as np
import torch
import transformers
import trl
from trl import GRPOTrainer

LIMIT = 12  # max_completion_length
CLIP = dict(epsilon_low=0.2, epsilon_high=0.28)
SETTINGS = {
    "grpo": dict(loss_type="grpo", **CLIP),
    "bnpo": dict(loss_type="bnpo", **CLIP),
    "dr_grpo": dict(loss_type="dr_grpo", **CLIP),
    "dapo": dict(loss_type="dapo", **CLIP),
    "dapo_delta": dict(loss_type="dapo", delta=3.0, **CLIP),
    "cispo": dict(loss_type="cispo", epsilon_low=0.2, epsilon_high=5.0),
    "gspo": dict(loss_type="grpo", level="sequence", epsilon_low=0.1, epsilon_high=0.15),
    "gspo_dapo": dict(loss_type="dapo", level="sequence", epsilon_low=0.1, epsilon_high=0.15),
    "grpo_kl": dict(loss_type="grpo", beta=0.3, **CLIP),
    "dapo_kl": dict(loss_type="dapo", beta=0.3, **CLIP),
    "dapo_tis": dict(loss_type="dapo", cap=2.0, **CLIP),
    "dapo_tis_kl": dict(loss_type="dapo", cap=2.0, beta=0.3, **CLIP),
    "dapo_entropy": dict(loss_type="dapo", entropy_coef=0.05, **CLIP),
}


def double(x):
    return torch.as_tensor(np.asarray(x, np.float64))


def accelerator():
    same = lambda x, **_: x
    return types.SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        gather=same,
        gather_for_metrics=same,
        reduce=same,
    )


def loss(draw, settings):
    """(loss, gradient to logp, gradient to entropy) of one draw, [row, token]."""
    beta, cap = settings.get("beta", 0.0), settings.get("cap")
    coef, mask = settings.get("entropy_coef", 0.0), torch.as_tensor(draw["mask"]).long()
    logp, entropy = double(draw["logp"]).requires_grad_(), double(draw["entropy"]).requires_grad_()
    stub = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, entropy, None),
        model=types.SimpleNamespace(training=True),
        accelerator=accelerator(),
        args=types.SimpleNamespace(
            delta=settings.get("delta"),
            use_bias_correction_kl=False,
            steps_per_generation=1,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=settings.get("level", "token"),
        beta=beta,
        loss_type=settings["loss_type"],
        epsilon_low=settings["epsilon_low"],
        epsilon_high=settings["epsilon_high"],
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=cap is not None,
        current_gradient_accumulation_steps=1,
        max_completion_length=LIMIT,
        _entropy_bonus_enabled=coef > 0,
        use_adaptive_entropy=False,
        entropy_coef=coef,
        _metrics={"train": defaultdict(list)},
    )
    stub.accelerator.sync_gradients = True
    ones = torch.ones_like(mask)
    inputs = dict(
        prompt_ids=ones[:, :1],
        prompt_mask=ones[:, :1],
        completion_ids=ones,
        completion_mask=mask,
        advantages=double(draw["adv"]),
        old_per_token_logps=double(draw["old"]),
        ref_per_token_logps=double(draw["ref"]),
        num_items_in_batch=mask.sum(),
    )
    if cap is not None:
        inputs["importance_sampling_ratio"] = score(draw, cap=cap)["importance_sampling_ratio"]
    value = GRPOTrainer._compute_loss(stub, None, inputs)
    value.backward()
    return value.item(), logp.grad.numpy(), np.zeros(mask.shape) + _grad(entropy)


def _grad(leaf):
    return 0.0 if leaf.grad is None else leaf.grad.numpy()


def score(draw, *, scale="group", group=draws.GROUP, cap=None):
    """The part of the batch that `_generate_and_score_completions` makes of a draw."""
    rows, tokens = draw["mask"].shape
    # the sampler returns lists, so a row without tokens cannot come from it: one token, unread
    length = np.maximum(draw["mask"].sum(1), 1)
    texts, ids = [""] * rows, [[1] * n for n in length]
    full = length.max()
    logps = [
        [None if np.isnan(x) else float(x) for x in row[:n]]
        for row, n in zip(draw["sampled"], length)
    ]
    reward = double(draw["reward"])[:, None]
    stub = mock.MagicMock()
    stub.accelerator, stub.model.training = accelerator(), True
    stub.environment_factories = stub.tools = stub.environments = None
    stub.pad_to_multiple_of = None
    stub._tokenizer.pad_token_id = 0
    stub.mask_truncated_completions = False
    stub._generate = lambda prompts: ([[1]] * rows, ids, None, texts, logps, {}, None, None)
    stub._calculate_rewards = lambda *a: reward
    old = double(draw["old"])[:, :full]
    stub._get_per_token_logps_and_entropies = lambda *a, **k: (old, None, None)
    stub.args.steps_per_generation = stub.args.gradient_accumulation_steps = 1
    stub.num_iterations, stub.num_generations, stub.beta = 1, group, 0.0
    stub.use_vllm = stub.vllm_importance_sampling_correction = cap is not None
    stub.vllm_importance_sampling_mode = "token_truncate"
    stub.vllm_importance_sampling_clip_min, stub.vllm_importance_sampling_clip_max = None, cap
    stub.multi_objective_aggregation, stub.scale_rewards = "sum_then_normalize", scale
    stub.reward_weights = torch.ones(1, dtype=torch.float64)
    stub.reward_func_names, stub._pending_extra_logs, stub._pending_metrics = ["r"], {}, {}
    stub.log_multimodal = False
    stub._metrics = {"train": defaultdict(list)}
    out = GRPOTrainer._generate_and_score_completions(stub, [{"prompt": "p"}] * rows)
    if cap is not None:
        short = tokens - full
        ratio = out["importance_sampling_ratio"]
        out["importance_sampling_ratio"] = torch.nn.functional.pad(ratio, (0, short), value=1.0)
    return out


def draw_of(inputs, d):
    rows, tokens = inputs["rows"][d], inputs["tokens"][d]
    cut = lambda x: x[d, :rows, :tokens] if x.ndim == 3 else x[d, :rows]
    return {k: cut(v) for k, v in inputs.items() if k not in ("rows", "tokens")}


def advantages(inputs, **settings):
    out = np.zeros(inputs["reward"].shape)
    for d in range(draws.DRAWS):
        out[d, : inputs["rows"][d]] = score(draw_of(inputs, d), **settings)["advantages"]
    return {"value": out}


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
    for scale in ("group", "none", "batch"):
        cases[f"advantages_{scale}"] = dict(scale_rewards=scale), advantages(inputs, scale=scale)
    cases["advantages_alone"] = dict(num_generations=1), advantages(inputs, group=1)
    nan = inputs | {"reward": np.where(np.arange(draws.ROWS) % 5 == 1, np.nan, inputs["reward"])}
    cases["advantages_nan"] = dict(nan="row 1 and 6"), advantages(nan)
    ratio = np.ones(inputs["logp"].shape)
    for d in range(draws.DRAWS):
        at = d, slice(inputs["rows"][d]), slice(inputs["tokens"][d])
        ratio[at] = score(draw_of(inputs, d), cap=2.0)["importance_sampling_ratio"]
    cases["importance"] = dict(mode="token_truncate", cap=2.0), {"value": ratio}
    value, grad, _ = loss(draws.far(), SETTINGS["dapo"])
    cases["dapo_far"] = SETTINGS["dapo"], {"value": value, "grad": grad}
    versions = {m.__name__: m.__version__ for m in (trl, torch, transformers)}
    draws.save("trl_grpo", "TRL GRPOTrainer", versions, inputs, cases)


main()
