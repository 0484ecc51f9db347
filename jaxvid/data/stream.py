"""Where a stream of items stands, in terms that do not depend on who reads it."""

import dataclasses
from typing import Any

import grain
from absl import flags


@dataclasses.dataclass(frozen=True)
class Items:
    """A data set to iterate over, any number of times. What `iter` gives is a `Stream`."""

    dataset: grain.MapDataset
    of: dict[str, Any]  # what a place is a place in
    unit: int = 1  # how many items all processes take while this one takes one
    workers: int = 0
    ahead: int = 2

    def __iter__(self) -> "Stream":
        return Stream(self)


class Stream:
    """Items in order, and where it stands: how many were taken, by all processes together, and of
    what. Another number of processes, or of workers, goes on from there."""

    def __init__(self, items: Items):
        self._items, self._taken, self._iterator = items, 0, None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            rest = self._items.dataset.slice(slice(self._taken, None))
            self._iterator = iter(_iterate(rest, self._items.workers, ahead=self._items.ahead))
        item = next(self._iterator)
        self._taken += 1
        return item

    def get_state(self) -> dict[str, Any]:
        return {"taken": self._taken * self._items.unit, "of": self._items.of}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a place that `get_state` gave. Raises ValueError if it is in other data, or
        between two items."""
        unit, of = self._items.unit, self._items.of
        if changed := [k for k in of if of[k] != state["of"].get(k)]:
            lines = "".join(f"\n  {k}: {state['of'].get(k)} -> {of[k]}" for k in changed)
            raise ValueError(
                f"the place in the data is of another stream, so that records would be lost or "
                f"seen twice:{lines}\nPut these back as they were, or start from the model in a "
                "new --workdir."
            )
        if state["taken"] % unit:
            raise ValueError(
                f"{state['taken']} items were taken, which do not divide over {unit} processes; "
                f"resume with a number of processes that divides them"
            )
        self.close()
        self._taken = state["taken"] // unit

    def close(self) -> None:
        """Stop what reads ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _iterate(dataset: grain.MapDataset, workers: int, *, ahead: int = 2) -> grain.IterDataset:
    """Elements are made `ahead` of their use. Where they are whole batches, a deep buffer would be
    many copies of a large array."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(ahead, 2))
    out = dataset.to_iter_dataset(options)
    if not workers:
        return out
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["jaxvid"])  # Grain's workers read absl flags, which must be parsed
    return out.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    )
