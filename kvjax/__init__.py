"""Small key-value caches for language models, in JAX, on TPU and GPU."""

from kvjax import codecs, plans, policies, serve
from kvjax.attention import attend
from kvjax.cache import Cache, LayerCache, nbytes
from kvjax.decoding import Decoded, decode, empty_cache, prefill, step
from kvjax.models.llama import Params, with_heads
from kvjax.models.rope import Rope
from kvjax.models.weights import Model, load
from kvjax.policy import Policy, Turn, store
from kvjax.report import report
from pallas_kernels.sharding import spread_over

__all__ = [
    "Cache",
    "Decoded",
    "LayerCache",
    "Model",
    "Params",
    "Policy",
    "Rope",
    "Turn",
    "attend",
    "codecs",
    "decode",
    "empty_cache",
    "load",
    "nbytes",
    "plans",
    "policies",
    "prefill",
    "report",
    "serve",
    "spread_over",
    "step",
    "store",
    "with_heads",
]
