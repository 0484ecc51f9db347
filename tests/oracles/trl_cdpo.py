# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "torch==2.13.0", "trl==0.24.0", "transformers==4.57.6", "accelerate==1.15.0",
#     "datasets==5.0.1", "numpy==2.4.6",
# ]
# ///
"""Conservative DPO, which TRL dropped at 1.0, and its kin: DPOTrainer.dpo_loss of TRL 0.24.

Called unbound, on a stub of the trainer, in float64. dpo_loss takes one log-prob per response:
the sum over its tokens, or for "ipo" the mean, as concatenated_forward of that version makes it.
"""

import types

import draws
import numpy as np
import torch
import transformers
import trl
from trl import DPOTrainer

SETTINGS = {
    "sigmoid": dict(loss_type="sigmoid", beta=0.1, label_smoothing=0.0),
    "conservative": dict(loss_type="sigmoid", beta=0.1, label_smoothing=0.1),
    "conservative_strong": dict(loss_type="sigmoid", beta=0.6, label_smoothing=0.3),
    "robust": dict(loss_type="robust", beta=0.3, label_smoothing=0.15),
    "hinge": dict(loss_type="hinge", beta=0.3, label_smoothing=0.0),
    "ipo": dict(loss_type="ipo", beta=0.4, label_smoothing=0.0),
}


def loss(logp, ref, mask, *, loss_type, beta, label_smoothing):
    """logp, ref, mask [pair, side, token] -> (mean loss, gradient)."""
    stub = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device=torch.device("cpu")),
        reference_free=False,
        f_divergence_type="reverse_kl",
        f_divergence_params=None,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    mask, leaf = torch.as_tensor(mask), torch.as_tensor(logp.astype(np.float64)).requires_grad_()
    count = mask.sum(-1) if loss_type == "ipo" else torch.ones(mask.shape[:2])
    each = lambda x: (torch.where(mask, x, 0.0).sum(-1) / count).unbind(1)
    still = torch.as_tensor(ref.astype(np.float64))
    losses, *_ = DPOTrainer.dpo_loss(stub, *each(leaf), *each(still), loss_type)
    losses.mean().backward()
    return losses.mean().item(), leaf.grad.numpy()


def main():
    inputs, cases = draws.pairs(), {}
    for name, settings in SETTINGS.items():
        values, grads = np.zeros(draws.DRAWS), np.zeros(inputs["logp"].shape)
        for d in range(draws.DRAWS):
            part = [inputs[k][d, : inputs["pairs"][d]] for k in ("logp", "ref", "mask")]
            values[d], grads[d, : inputs["pairs"][d]] = loss(*part, **settings)
        cases[name] = settings, {"value": values, "grad": grads}
    versions = {m.__name__: m.__version__ for m in (trl, torch, transformers)}
    draws.save("trl_cdpo", "TRL DPOTrainer.dpo_loss", versions, inputs, cases)


main()
