"""One of several processes that save checkpoints together and go on from them.

python tests/shared.py PORT PROCESSES PROCESS FOLDER save|restore|half

half: restore, and the last process cannot read step 2
"""

import pathlib
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from toy import ADAM, toy  # noqa: E402

from jaxvid.train import checkpoint  # noqa: E402
from jaxvid.train import state as states  # noqa: E402


def placed(state, mesh):
    """The state, its matrices over all devices."""

    def put(x):
        cut = x.ndim > 1 and x.shape[0] % mesh.size == 0
        where = NamedSharding(mesh, P("all") if cut else P())
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, where, lambda at: host[at])

    return jax.tree.map(put, state)


def main(port: str, processes: str, process: str, folder: str, what: str) -> None:
    if int(processes) > 1:
        jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
    mesh = jax.make_mesh((len(jax.devices()),), ("all",))
    state = placed(states.create(toy()[1], ADAM.build(6, toy()[1])), mesh)
    saver = checkpoint.Checkpoints(folder if "://" in folder else pathlib.Path(folder))
    if what == "save":
        for n in (1, 2):
            saver.save(n, state, checkpoint.Meta(0, {"taken": n}, {}))
    else:
        if what == "half" and jax.process_index() == jax.process_count() - 1:
            honest = ocp.PyTreeCheckpointHandler.restore

            def torn(self, directory, *args, **options):
                if directory.parent.name == "2":
                    raise OSError("no such disk")
                return honest(self, directory, *args, **options)

            ocp.PyTreeCheckpointHandler.restore = torn
        n, back, meta = saver.restore(state)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
            for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
                np.testing.assert_array_equal(np.asarray(x.data), np.asarray(y.data))
        saver.save(n + 1, back, meta)
        print(f"went on from step {n}, {meta.data}, passed {saver.passed}")
    saver.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
