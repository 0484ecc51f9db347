"""Weights and pixels in the forms that transformers' modules and ours take them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxvid.models import hf


def filled(build, where, tensor):
    """The module `build` makes, with `tensor(name)` in every weight, its name by `where[path]`."""
    graph, shapes = nnx.split(nnx.eval_shape(build))

    def fill(path, v):
        place, n = where[hf._path(path)], v.shape[0]
        names = [place.name.format(i) for i in range(n if "{}" in place.name else 1)]
        each = [np.asarray(tensor(name)) for name in names]
        each = [x.reshape(len(x), -1).T if place.inputs else x for x in each]
        return v.replace(jnp.asarray(np.stack(each).reshape(v.shape)))

    is_weight = lambda v: isinstance(v, nnx.Variable)
    return nnx.merge(graph, jax.tree.map_with_path(fill, shapes, is_leaf=is_weight))


def drawn(state):
    """Numbers for every tensor of a torch state dict, such that products keep their size."""
    r = np.random.default_rng(0)
    out = {}
    for name, w in state.items():
        x = r.random(w.shape, np.float32)  # normal ones take five times as long
        inputs = w[0].numel() if w.ndim > 1 else len(w)
        np.multiply(np.subtract(x, 0.5, out=x), (12 / inputs) ** 0.5, out=x)
        out[name] = x + 1 if "norm" in name and name.endswith("weight") else x
    return out


def pixels(v, patches):
    """Patches [..., Q, C] of tower `v` as normalised images [..., 3, pixels, pixels]; the pixels
    beyond the last whole patch are 0."""
    x = patches.reshape(-1, v.side, v.side, 3, v.patch, v.patch).astype(np.float32) / 255
    x = x.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, v.side * v.patch, v.side * v.patch)
    mean, std = (np.reshape(np.float32(s), (1, 3, 1, 1)) for s in (v.image_mean, v.image_std))
    x = np.pad((x - mean) / std, [(0, 0)] * 2 + [(0, v.image - v.side * v.patch)] * 2)
    return x.reshape(*patches.shape[:-2], 3, v.image, v.image)
