"""Compiling for TPUs that are not here. Needs libtpu, which runs on any Linux machine.

The executable cannot run here, but Mosaic and XLA really compile it, and refuse what does not fit into VMEM.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.dispatch import compiling_for

TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")  # the smallest slices of each generation


@functools.cache
def one_chip(topology: str) -> NamedSharding:
    """The first chip of a slice such as "v5e:2x2"."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # of processes that only compile
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    return NamedSharding(Mesh(np.array(devices[:1]), ("one",)), PartitionSpec())


def compile_for_tpu(function: Callable, *shapes: Any, topology: str = TPUS[0], **options: Any) -> jax.stages.Compiled:
    """Compiles `function` of arrays for one chip, with the kernels that a TPU would choose.

    Args:
      function: What to compile.
      shapes: Its arguments: trees of `jax.ShapeDtypeStruct`, or arrays.
      topology: The slice of which the chip is one.
      options: For `jax.jit`, such as donate_argnums.

    Returns:
      The executable; its `memory_analysis()` says what the chip would hold.
    """
    chip = one_chip(topology)
    with compiling_for("tpu"):
        return jax.jit(function, in_shardings=chip, out_shardings=chip, **options).lower(*shapes).compile()
