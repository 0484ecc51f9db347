"""GRPO steps of google-tunix, timed: run by benchmarks/grpo.py in an environment that has it.

Imports nothing of this project. Prints one line of JSON.
"""

import json
import resource
import sys
import time

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig


class Numbers:
    """A tokenizer of numbers in a row."""

    def encode(self, text, **kwargs):
        return [int(word) for word in text.split()]

    def decode(self, ids, **kwargs):
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


def reward(prompts, completions, **kwargs):
    """Something that differs between replies."""
    return [sum(int(w) % 2 for w in c.split()) / max(len(c.split()), 1) for c in completions]


def main(sizes):
    text = dict(sizes["text"])
    cfg = qwen2.ModelConfig(
        num_layers=text["layers"],
        vocab_size=text["vocab"],
        embed_dim=text["width"],
        hidden_dim=text["ffn"],
        num_heads=text["heads"],
        head_dim=text["width"] // text["heads"],
        num_kv_heads=text["kv_heads"],
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with mesh:
        model = qwen2.Qwen2(cfg, rngs=nnx.Rngs(0))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    P, R, G = sizes["prompt"], sizes["reply"], sizes["group"]
    roles = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={roles.ACTOR: mesh, roles.ROLLOUT: mesh},
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-5), eval_every_n_steps=10**6, max_steps=10**6
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=R,
                max_prompt_length=P,
                kv_cache_size=P + R + 1,
                temperature=1.0,
            ),
        ),
    )
    config = GRPOConfig(num_generations=G, num_iterations=1, beta=0.0)
    learner = GRPOLearner(cluster, reward_fns=reward, algo_config=config)
    rng = np.random.default_rng(0)
    marks = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def batches():
        for _ in range(sizes["repeats"] + 1):
            marks.append(time.perf_counter())
            ids = rng.integers(3, text["vocab"], (sizes["prompts"], P - 1))
            yield {"prompts": np.array([" ".join(map(str, row)) for row in ids])}

    learner.train(batches())
    marks.append(time.perf_counter())
    laps = np.diff(marks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {"seconds": laps[1:].tolist(), "peak": peak * 1024, "before": before * 1024}
    print(json.dumps(told | {"parameters": int(count)}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
