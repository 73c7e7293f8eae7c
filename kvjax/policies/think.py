"""ThinK, keys with fewer channels. Xu et al. 2024, arXiv:2407.21018."""

import jax.numpy as jnp

from kvjax.codecs import prune_channels
from kvjax.counts import whole
from kvjax.policy import Policy, evict, method, store
from kvjax.scorers import recency
from kvjax.tiers import demote


@method
def think(
    channels: int, *, recent: int = 32, window: int = 32, answer: int = 0, tokens: Policy | None = None
) -> Policy:
    """Keeps `channels` channels of every key but the newest `recent`: those that the last queries of the prompt use.

    The choice is made once for each row and head, when the prompt has been read. Values stay whole.

    Bytes: L B H ((n - recent + 1) ((D + channels) b + 4) + (recent + answer + 1) (2 D b + 4) + 4 channels) + L B + 4 B.

    Args:
      channels: Channels of a key that stay, below head_dim. The paper prunes int(0.4 D): 39 of 64 stay, 77 of 128.
      recent: Newest tokens, whose keys are whole.
      window: Last queries of the prompt, which choose.
      answer: Tokens after the prompt whose keys stay whole beside the newest; in the published code all do. They are
        given slots of their own, and the first keys are pruned when those are full.
      tokens: Another policy that evicts the older tokens, such as `h2o(budget=224, window=32)`; its budget
        counts those without the newest `recent`. None keeps them all.

    SmolLM2, whose heads have 64 channels, has fewer to spare than the paper's models with 128: at 39 of them, 40 %
    pruned, the KL is 0.025 nats (n = 4 texts), and of hidden numbers, names and words 56, 44 and 0 % are found where
    the full cache finds 88, 88 and 31 % (n = 16 each). In smaller runs, of which no record is kept, 48 channels lost
    nothing; to ask all queries of the prompt, and not the last 32, changed nothing; and whole keys for the newest 256
    of 1000 tokens mended half of the loss.

    Source: the paper's published code, with one choice for the query heads of a group, which its authors found as good.
    Differs: a key that leaves the newest is pruned too, also while answering, beyond `answer`. The last queries choose,
    so a cache is not for another question; a prompt cannot be read in chunks. Channels are not pruned in pairs: only
    keys that are rotated anew, as none are here, would need both of a pair. Not offered: pruned values, which the paper
    found to lose more, by a score that is not published; and max pooling of votes, which belongs to the method given as
    `tokens`, and `snapkv` averages. Rounded keys with fewer channels are `kivi(channels=)`.
    """
    recent = whole("think", "recent", recent, least=1, mend="codecs.prune_channels alone prunes every key.")
    if tokens is None:
        tokens = evict(recency(), budget=None, grow=lambda n, room: max(n + room - recent, 0) + 1)
    low = store(tokens, keys=prune_channels(channels, window=window))
    answer = whole("think", "answer", answer, least=0, mend="It counts tokens.")
    if answer == 0:
        return demote(recency(), low, budget=recent, stepwise="turns")

    def limit(seen):  # a prompt leaves the newest; what follows it comes token by token
        return jnp.full(seen.now.shape, recent if seen.positions.shape[1] > 1 else recent + answer)

    return demote(recency(), low, limit=limit, grow=lambda n, room: recent + answer + 1, stepwise="turns")
