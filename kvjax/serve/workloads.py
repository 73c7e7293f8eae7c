"""Batches of prompts with shared prefixes, as BatchLLM (arXiv:2412.03594) describes them, and what a cache would save.

Tokens are uniform draws. The paper gives sizes and mean degrees of its industrial batch; their distributions are ours.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvjax.counts import whole
from kvjax.serve.prefix_plan import Plan


class Workload(NamedTuple):
    """Prompts i32[T], and the tokens to be generated for each."""

    prompts: tuple[np.ndarray, ...]
    outputs: tuple[int, ...]


def micro(prefix: int, suffix: int, degree: int, n: int, out: int, seed: int = 0, *, vocab: int = 32_000) -> Workload:
    """The paper's microbenchmark: groups of `degree` prompts with a prefix of their own, shuffled.

    Prefixes differ in their first token, and so do the suffixes behind one prefix: plans save what the sizes say, and
    nothing by chance.

    Args:
      prefix: Tokens that each group shares.
      suffix: Tokens of each prompt behind its prefix.
      degree: Prompts of a group; the last one takes what is left of n.
      n: Prompts.
      out: Tokens to be generated for each.
      seed: Of the draws.
      vocab: Token ids are below it.

    Raises:
      ValueError: If a size is below 1, or if vocab has fewer tokens than there are groups, or prompts in one.
    """
    sizes = dict(prefix=prefix, suffix=suffix, degree=degree, n=n, out=out)
    prefix, suffix, degree, n, out = (whole("micro", name, value, least=1) for name, value in sizes.items())
    groups = -(-n // degree)
    vocab = whole("micro", "vocab", vocab, least=max(groups, degree), mend="First tokens must all differ.")
    rng = _draws("micro", seed)
    shared = rng.integers(vocab, size=(groups, prefix), dtype=np.int32)
    shared[:, 0] = rng.choice(vocab, size=groups, replace=False)
    prompts = []
    for row in shared:
        own = rng.integers(vocab, size=(degree, suffix), dtype=np.int32)
        own[:, 0] = rng.choice(vocab, size=degree, replace=False)
        prompts.extend(np.concatenate([row, end]) for end in own[: n - len(prompts)])
    return Workload(tuple(prompts[i] for i in rng.permutation(n)), (out,) * n)


def industry(n: int, seed: int = 0, *, out: int = 100, vocab: int = 32_000) -> Workload:
    """A batch like the paper's industrial one: an instruction, a document that few prompts share, a short suffix.

    One of eight instructions of 60 tokens; documents of 1510 tokens on average, 16 to 8000, shared by 2.45 prompts
    on average; suffixes of 30 tokens on average. Lengths are lognormal with sigma 0.5, degrees geometric; shuffled.

    Args:
      n: Prompts.
      seed: Of the draws.
      out: Tokens to be generated for each.
      vocab: Token ids are below it.

    Raises:
      ValueError: If n or out is below 1, or vocab below 8.
    """
    n = whole("industry", "n", n, least=1)
    out = whole("industry", "out", out, least=1)
    vocab = whole("industry", "vocab", vocab, least=8, mend="Eight instructions begin with different tokens.")
    rng = _draws("industry", seed)
    instructions = rng.integers(vocab, size=(8, 60), dtype=np.int32)
    instructions[:, 0] = rng.choice(vocab, size=8, replace=False)

    def length(mean: float) -> int:
        return round(rng.lognormal(np.log(mean) - 0.5**2 / 2, 0.5))

    prompts = []
    while len(prompts) < n:
        document = rng.integers(vocab, size=min(max(length(1510), 16), 8000), dtype=np.int32)
        head = np.concatenate([instructions[rng.integers(8)], document])
        for _ in range(min(rng.geometric(1 / 2.4516), n - len(prompts))):
            prompts.append(np.concatenate([head, rng.integers(vocab, size=max(length(30), 1), dtype=np.int32)]))
    return Workload(tuple(prompts[i] for i in rng.permutation(n)), (out,) * n)


def lru_saving(plan: Plan, lengths: Sequence[int], outputs: Sequence[int], *, capacity: int) -> float:
    """Tokens, in percent of all, that a prefix cache with least-recently-used eviction saves, in the order of prompts.

    A model of online serving, to compare a plan with: requests run one by one; an entry for each prefix of the plan,
    found whole or not at all, and one for what a request adds.

    Args:
      plan: Says which prefixes there are.
      lengths: Tokens of each prompt.
      outputs: Tokens generated for each.
      capacity: Tokens that the cache holds.
    """
    group_of = {i: g for g, group in enumerate(plan.groups) for i in group.members}
    entries, held, saved = OrderedDict(), 0, 0
    for i in range(len(lengths)):
        g = group_of[i]
        prefix = plan.groups[g].prefix_length
        if ("prefix", g) in entries:
            saved += prefix
        for key, size in ((("prefix", g), prefix), (("request", i), lengths[i] - prefix + outputs[i])):
            held += size - entries.pop(key, 0)
            entries[key] = size  # the newest
        while held > capacity:
            held -= entries.popitem(last=False)[1]
    return 100 * saved / sum(lengths)


def _draws(where: str, seed: int) -> np.random.Generator:
    return np.random.default_rng(whole(where, "seed", seed, least=0))
