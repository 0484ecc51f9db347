# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0",
#     "datasets==5.2.0", "numpy==2.4.6",
# ]
# ///
"""TRL's DPO losses and their gradients: DPOTrainer._compute_loss on a model that is a table.

The method is called unbound, on a stub of the trainer, in float64. The "model" hands out the drawn
log-probs as `log_probs`, 0 outside of the completion, as TRL's fused head does.
"""

import types
from collections import defaultdict

import draws
import numpy as np
import torch
import transformers
import trl
from trl import DPOTrainer

SETTINGS = {
    "sigmoid": dict(loss_types=["sigmoid"], beta=0.1),
    "sigmoid_strong": dict(loss_types=["sigmoid"], beta=0.5),
    "hinge": dict(loss_types=["hinge"], beta=0.3),
    "ipo": dict(loss_types=["ipo"], beta=0.4),
    "sigmoid_norm": dict(loss_types=["sigmoid_norm"], beta=2.0),
    "robust": dict(loss_types=["robust"], beta=0.3, label_smoothing=0.15),
    "sigmoid_smoothed": dict(loss_types=["sigmoid"], beta=0.5, label_smoothing=0.3),  # no effect
    "sigmoid_sft": dict(loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.7], beta=0.1),
}


class Table(torch.nn.Module):
    is_gradient_checkpointing = False

    def __init__(self, logp):
        super().__init__()
        self.logp = logp

    def forward(self, **kwargs):
        zeros = torch.zeros_like(self.logp)
        return types.SimpleNamespace(
            log_probs=self.logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


def trainer(model, ref, *, loss_types, beta, loss_weights=None, label_smoothing=0.0):
    same = lambda x: x
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same
    )
    return types.SimpleNamespace(
        model=model,
        ref_model=ref,
        accelerator=accelerator,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        loss_types=loss_types,
        loss_weights=loss_weights or [1.0] * len(loss_types),
        beta=beta,
        label_smoothing=label_smoothing,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def loss(logp, ref, mask, settings):
    """logp, ref, mask [pair, side, token] -> (loss, gradient). TRL's batch is chosen, rejected."""
    both = lambda x: torch.as_tensor(np.concatenate([x[:, 0], x[:, 1]]))
    mask, leaf = both(mask), both(logp.astype(np.float64)).requires_grad_()
    zero = torch.zeros((), dtype=torch.float64)
    seen = torch.where(mask, leaf, zero)
    still = torch.where(mask, both(ref.astype(np.float64)), zero)
    # the first column is the prompt's: its log-prob is not scored
    full = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()
    model = Table(seen)
    stub = trainer(model, Table(still), **settings)
    inputs = dict(input_ids=full, completion_mask=full, attention_mask=torch.ones_like(full))
    value = DPOTrainer._compute_loss(stub, model, inputs, False)
    value.backward()
    return value.item(), np.stack(np.split(leaf.grad.numpy(), 2), 1)


def main():
    inputs, cases = draws.pairs(), {}
    for name, settings in SETTINGS.items():
        values, grads = np.zeros(draws.DRAWS), np.zeros(inputs["logp"].shape)
        for d in range(draws.DRAWS):
            n = inputs["pairs"][d]
            # TRL's sft term is a mean over the tokens of a batch; pair by pair it is ours
            size = 1 if "sft" in settings["loss_types"] else n
            for i in range(0, n, size):
                part = [inputs[k][d, i : i + size] for k in ("logp", "ref", "mask")]
                value, grad = loss(*part, settings)
                values[d] += value * size / n
                grads[d, i : i + size] = grad * size / n
        cases[name] = settings, {"value": values, "grad": grads}
    versions = {m.__name__: m.__version__ for m in (trl, torch, transformers)}
    draws.save("trl_dpo", "TRL DPOTrainer._compute_loss", versions, inputs, cases)


main()
