"""Kernels for small key-value caches, for TPU (Pallas) and GPU (Triton). Needs jax alone; kvjax is not needed.

A folder an operation: `reference.py` is its definition in plain jnp, `tpu.py` and `gpu.py` are kernels with the same
signature. Letters in shapes: B rows, H kv_heads, G query heads of each, T queries, N slots, D channels.
"""
