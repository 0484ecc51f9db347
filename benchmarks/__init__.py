"""Measurements of speed and memory, each a script: `python -m benchmarks.tree --help`.

The variables let the TPU compiler run on a machine without a TPU. jax and libtpu read them when
they are loaded, so they are set before anything here imports jax.
"""

import os

for name, value in {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several such processes may run
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}.items():
    os.environ.setdefault(name, value)
