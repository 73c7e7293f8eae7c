"""Vectors as integers of a few bits: what `slot_attention` reads in place of an array of keys or values."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Each vector's channels in groups, every channel near step code + low of its group.

    Attributes:
      codes: u32[B, H, N, W], words of 32 bits: the first channel in the lowest bits of the first word. Three bits lie
        in two planes, one after the other: the lower two bits of all channels, then the highest.
      step: f16[B, H, N, D / group].
      low: f16[B, H, N, D / group].
      bits: Of a code: 8, 4, 3 or 2.
      group: Channels that share a step and a low.
    """

    codes: jax.Array
    step: jax.Array
    low: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})

    @property
    def channels(self) -> int:
        """D."""
        return self.step.shape[-1] * self.group

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the vectors that are stored: (B, H, N, D)."""
        return (*self.step.shape[:-1], self.channels)

    def load(self) -> jax.Array:
        """What is stored, f32[B, H, N, D]."""
        step, low = (jnp.repeat(x.astype(jnp.float32), self.group, axis=-1) for x in (self.step, self.low))
        return unpack(self.codes, self.bits, self.channels).astype(jnp.float32) * step + low


def words(channels: int, bits: int) -> int:
    """Words of 32 bits that the codes of so many channels take."""
    return words(channels, 2) + words(channels, 1) if bits == 3 else -(-channels * bits // 32)


def unpack(codes: jax.Array, bits: int, channels: int) -> jax.Array:
    """Codes of the first `channels` channels, u32[..., channels], out of words u32[..., W]."""
    if bits == 3:
        lower = words(channels, 2)
        return unpack(codes[..., :lower], 2, channels) + 4 * unpack(codes[..., lower:], 1, channels)
    places = bits * jnp.arange(32 // bits, dtype=jnp.uint32)
    each = (codes[..., None] >> places) & jnp.uint32(2**bits - 1)  # [..., W, codes of a word]
    return each.reshape(*codes.shape[:-1], -1)[..., :channels]
