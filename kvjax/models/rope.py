"""Rotary positions (Su et al. 2021, arXiv:2104.09864), in the half-split form of the Llama family."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rule: long wavelengths are stretched by `factor`, short ones stay, between them a ramp."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (position interpolation)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn into rotations. Hashable, so it can be static under jit.

    Attributes:
      base: Base of the geometric series of wavelengths (`rope_theta`).
      scaling: None, or one of the scaling rules above.
    """

    base: float = 10000.0
    scaling: Llama3Scaling | LinearScaling | None = None

    def __post_init__(self):
        """Refuses numbers that give no rotation."""
        factor = 1.0 if self.scaling is None else self.scaling.factor
        if not (1 < self.base < math.inf and 0 < factor < math.inf):
            raise ValueError(f"rope: base={self.base} must be above 1, and the scaling's factor={factor} above 0.")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each channel pair, f32[head_dim / 2]."""
        freqs = self.base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        match self.scaling:
            case LinearScaling(factor):
                freqs = freqs / factor
            case Llama3Scaling(factor, low, high, context):
                wavelength = 2 * math.pi / freqs
                ramp = (context / wavelength - low) / (high - low)
                keep = np.clip(ramp, 0.0, 1.0)  # 1: a short wavelength, left alone
                freqs = keep * freqs + (1 - keep) * freqs / factor
        return freqs.astype(np.float32)

    def angles(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine at `positions` i32[...]: each f32[..., head_dim / 2]."""
        angle = positions[..., None].astype(jnp.float32) * self.frequencies(head_dim)
        return jnp.cos(angle), jnp.sin(angle)

    def table(self, count: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine at positions 0..count-1, to be indexed: each f32[count, head_dim / 2]."""
        return self.angles(jnp.arange(count), head_dim)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x` [..., D] by angles that broadcast against [..., D / 2]; computes in f32, keeps the dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
