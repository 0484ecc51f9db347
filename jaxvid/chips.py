"""What the devices of a run could do at most: dense bfloat16 products a second, as vendors print.

Google's are of a chip, from cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), read in 2026; JAX
has a device for a chip, and for TPU7x one for each of a chip's two parts. NVIDIA's are from the
data sheets of A100, H100, H200, GH200 and B200 (HGX), halved where they are given "with sparsity".
"""

import re

PEAKS = {  # by the name that JAX gives the device, or what a GPU's begins with
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak(kind: str) -> float | None:
    """bfloat16 products a second, in FLOP/s, of a device with this `device_kind`; None where it is
    not known, and for a part of a GPU (MIG)."""
    if kind in PEAKS or not kind.startswith("NVIDIA") or " MIG " in kind:
        return PEAKS.get(kind)
    found = [name for name in PEAKS if re.match(rf"{name}\b", kind)]
    return PEAKS[max(found, key=len)] if found else None
