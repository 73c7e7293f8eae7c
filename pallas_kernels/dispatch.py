"""Which implementation of an operation runs: "tpu", "gpu" or "reference"."""

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Callable, Iterator

import jax

IMPLEMENTATIONS = ("tpu", "gpu", "reference")
CAPABILITIES = ("8.0", "9.0")  # of GPUs that every kernel is compiled for; others of Ampere have less shared memory

_compiling_for = contextvars.ContextVar("compiling_for", default=(None, None))


@functools.cache
def here() -> tuple[str, str]:
    """What this machine runs when nothing is asked for by name, and why."""
    platform = jax.default_backend()
    if platform == "tpu":
        return "tpu", "the default backend is a TPU"
    if platform != "gpu":
        return "reference", f"there are no kernels for {platform}"
    if importlib.util.find_spec("jax_triton") is None:
        return "reference", "jax-triton is not installed (pip install 'kvjax[gpu]')"
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "0.0"))
    if capability not in CAPABILITIES:
        known = " and ".join(CAPABILITIES)
        return "reference", f"{device.device_kind} has compute capability {capability}, and the kernels are for {known}"
    return "gpu", f"the default backend is {device.device_kind}"


def preferred() -> str:
    """What runs when nothing is asked for by name."""
    return _compiling_for.get()[0] or here()[0]


def capability() -> int | None:
    """Of the GPU that is compiled for ahead of time, such as 90; None is the one that is here."""
    return _compiling_for.get()[1]


def choose(operation: str, implementation: str | None, unfit: Callable[[str], str | None]) -> str:
    """The implementation to run.

    Args:
      operation: For errors.
      implementation: Asked for by name; None takes what this machine has, or the reference where that does not fit.
      unfit: (implementation) -> why it cannot do this call, or None. The reference can do every call.

    Raises:
      ValueError: If the one asked for by name does not exist, does not fit, or cannot run here.
    """
    name = preferred()
    if implementation is None:
        return name if name == "reference" or unfit(name) is None else "reference"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{operation}: implementation={implementation!r} must be one of {IMPLEMENTATIONS}, or None.")
    if implementation == "reference":
        return implementation
    if (why := unfit(implementation)) is not None:
        raise ValueError(f"{operation}: implementation={implementation!r} cannot do this call: {why}.")
    if implementation != name:
        raise ValueError(
            f"{operation}: implementation={implementation!r} cannot run here: {here()[1]}. None takes what can."
        )
    return implementation


@contextlib.contextmanager
def compiling_for(implementation: str, capability: int | None = None) -> Iterator[None]:
    """Chooses as a machine with that implementation would, to compile ahead of time for one.

    It is looked at when a program is traced: one that was traced before stays as it is. `capability` is the GPU's.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"compiling_for: implementation={implementation!r} must be one of {IMPLEMENTATIONS}.")
    token = _compiling_for.set((implementation, capability))
    try:
        yield
    finally:
        _compiling_for.reset(token)
