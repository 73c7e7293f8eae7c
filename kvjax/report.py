"""What a cache holds, in bytes."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from kvjax import kernels
from kvjax.cache import FREE, Cache, nbytes
from pallas_kernels import dispatch


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes of a cache by kind, beside what a full cache of the same length would take. Printing it gives a table.

    Attributes:
      policy: Name of the policy.
      by_kind: Bytes of keys, values, positions, statistics and the rest; they add up to `total`.
      total: Bytes of all buffers, `kvjax.nbytes`.
      full: Bytes of a cache that keeps every token of the longest row, in as many rows.
      slots: Slots allocated, over rows, heads and layers.
      used: Slots that hold a token.
      tokens: Tokens that the longest row has seen.
      attention: What attends to it here in decode steps, "tpu" or "gpu" for a kernel, or "reference"; and why.
    """

    policy: str
    by_kind: dict[str, int]
    total: int
    full: int
    slots: int
    used: int
    tokens: int
    attention: str

    def __str__(self) -> str:
        """A table of a line for each kind."""
        rows = [f"{kind:<12}{size:>14,} B" for kind, size in self.by_kind.items() if size]
        return "\n".join(
            [
                self.policy,
                *rows,
                f"{'total':<12}{self.total:>14,} B   {self.total / self.full:.1%} of full at {self.tokens} tokens",
                f"{'occupancy':<12}{self.used:>14,} of {self.slots:,} slots ({self.used / max(self.slots, 1):.1%})",
                f"{'attention':<12}{self.attention}",
            ]
        )


def report(cache: Cache) -> Report:
    """Reads off what `cache` holds. Needs its values: not under jit."""
    if not isinstance(cache, Cache):
        raise ValueError(f"report: cache is a {type(cache).__name__}, and must be a kvjax.Cache.")
    layers, config = [tier for layer in cache.layers for tier in layer.tiers], cache.config
    by_kind = {
        "keys": nbytes([layer.k for layer in layers]),
        "values": nbytes([layer.v for layer in layers]),
        "positions": nbytes([layer.pos for layer in layers]) + nbytes(cache.length),
        "statistics": nbytes([layer.stats for layer in layers]),
        "other": nbytes([(layer.carry, layer.fitted) for layer in layers]),
    }
    batch, tokens = cache.length.shape[0], int(np.max(np.asarray(cache.length)))
    number = layers[0].dtype.itemsize
    token = 2 * config.head_dim * number + jnp.dtype(jnp.int32).itemsize  # of one head
    return Report(
        policy=cache.policy.name,
        by_kind=by_kind,
        total=nbytes(cache),
        full=config.layers * batch * config.kv_heads * tokens * token + nbytes(cache.length),
        slots=sum(layer.pos.size for layer in layers),
        used=sum(int(np.sum(np.asarray(layer.pos) != FREE)) for layer in layers),
        tokens=tokens,
        attention=_attention(cache),
    )


def _attention(cache: Cache) -> str:
    """What runs, and how it came to be chosen."""
    policies = cache.policy.of_layers(len(cache.layers))
    names = [kernels.in_decode_steps(own, layer) for own, layer in zip(policies, cache.layers, strict=True)]
    preferred = dispatch.preferred()
    if preferred == "reference" or set(names) == {preferred}:
        return f"{preferred}: {dispatch.here()[1]}"
    return (
        f"reference in {names.count('reference')} of {len(names)} layers, whose form no kernel reads; else {preferred}"
    )
