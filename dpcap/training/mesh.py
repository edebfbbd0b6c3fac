"""Which device holds what: one mesh over all devices of all processes.

Axis 'data': each of its rows sums the clipped gradients of its own physical batches, and
holds one shard of the optimizer's state (as in ZeRO: Rajbhandari et al. 2020, arXiv
1910.02054). Axis 'model': devices of a row share the parameters between them, for models
that are too large for one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpcap.errors import UserError

PyTree = Any

DATA, MODEL = 'data', 'model'

# Smaller arrays are not worth a collective of their own kind: every device has them whole.
_SMALLEST_SHARDED = 2**10


def make_mesh(model_parallel: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Devices (default: all) as (rows, model_parallel); a row lies within one process.

  Raises:
    UserError: if the devices cannot be cut that way.
  """
  devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
  if jax.local_device_count() % model_parallel:
    raise UserError(
      f'mesh.model_parallel is {model_parallel}; it must divide the devices of a process,'
      f' {jax.local_device_count()}'
    )
  grid = np.array(devices).reshape(-1, model_parallel)
  return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where arrays of a run lie on a mesh; follows from their shapes alone.

  Attributes:
    mesh: of `make_mesh`.
  """

  mesh: Mesh

  @property
  def rows(self) -> int:
    """Devices along the data axis: as many physical batches are summed at a time."""
    return self.mesh.shape[DATA]

  @property
  def local_rows(self) -> range:
    """The rows of this process."""
    local = self.mesh.local_mesh.devices
    first = int(np.argwhere(self.mesh.devices == local.flat[0])[0, 0])
    return range(first, first + local.shape[0])

  def whole(self) -> NamedSharding:
    """Every device has all of it."""
    return NamedSharding(self.mesh, PartitionSpec())

  def everywhere(self, tree: PyTree) -> PyTree:
    """`tree`, which every process has, whole on every device."""
    return jax.jit(lambda tree: tree, out_shardings=self.whole())(tree)

  def by_row(self) -> NamedSharding:
    """The leading axis runs over rows."""
    return NamedSharding(self.mesh, PartitionSpec(DATA))

  def params(self, tree: PyTree) -> PyTree:
    """Shardings of parameters: whole in each row, cut along its model axis."""
    return jax.tree.map(lambda x: self._sharding(self._model_axis(x.shape), None, x.ndim), tree)

  def sums_of_rows(self, tree: PyTree) -> PyTree:
    """Shardings of sums (rows, ...) of what is shaped as parameters, one to a row."""

    def sharding(x):
      spec = self._sharding(self._model_axis(x.shape[1:]), None, x.ndim - 1).spec
      return NamedSharding(self.mesh, PartitionSpec(DATA, *spec))

    return jax.tree.map(sharding, tree)

  def shards(self, tree: PyTree) -> PyTree:
    """Shardings of what each device holds a part of: gradients, the optimizer's state."""
    return jax.tree.map(
      lambda x: self._sharding(self._model_axis(x.shape), self.scattered_axis(x.shape), x.ndim),
      tree,
    )

  def scattered_axis(self, shape: tuple[int, ...]) -> int | None:
    """The axis of a parameter that is cut along rows; None: it stays whole."""
    return self._axis(shape, self.rows, taken=self._model_axis(shape))

  def _model_axis(self, shape: tuple[int, ...]) -> int | None:
    return self._axis(shape, self.mesh.shape[MODEL], taken=None)

  def _axis(self, shape, parts: int, taken: int | None) -> int | None:
    """The longest axis that can be cut into equal parts."""
    if parts == 1 or np.prod(shape, dtype=int) < _SMALLEST_SHARDED:
      return None
    fitting = [d for d, size in enumerate(shape) if size % parts == 0 and d != taken]
    return max(fitting, key=lambda d: shape[d], default=None)

  def _sharding(self, model_axis: int | None, data_axis: int | None, ndim: int) -> NamedSharding:
    spec = [None] * ndim
    if model_axis is not None:
      spec[model_axis] = MODEL
    if data_axis is not None:
      spec[data_axis] = DATA
    return NamedSharding(self.mesh, PartitionSpec(*spec))
