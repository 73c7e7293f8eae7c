"""Trained heads that say which tokens to keep: flax modules, one for each layer, and the files they come in.

    params = kvjax.with_heads(model.params, kvjax.heads.load("smollm2-locret", model.params))
    kvjax.decode(params, kvjax.policies.locret(256), tokens, max_new_tokens=64)

`train/` in the repository trains them. Importing this package imports flax, which `import kvjax` does not.
"""

from kvjax.heads.attention_gate import AttentionGate, LinearGate
from kvjax.heads.files import load, make, save, with_heads_for
from kvjax.heads.locret import RetainingHead

__all__ = ["AttentionGate", "LinearGate", "RetainingHead", "load", "make", "save", "with_heads_for"]
