"""The full cache: every token stays. What the others are compared with."""

from kvjax.policy import Policy, evict, method
from kvjax.scorers import recency


@method
def full() -> Policy:
    """Keeps every token; capacity grows with the sequence.

    Bytes: L B H n (2 D b + 4) + 4 B, for n tokens, L layers, b bytes a number.
    """
    return evict(recency(), budget=None)
