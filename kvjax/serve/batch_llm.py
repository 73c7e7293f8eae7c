"""Offline batches that share prefixes. BatchLLM, Zheng et al. 2024, arXiv:2412.03594.

All prompts are known, so what they share is found first (`prefix_plan`). Each prefix is then read once, kept as long as
a prompt of its group is alive, and attended to once for all of them:

    block of a group   [ prefix, L_g slots ]         one row of `prefixes`
                       [ suffix and answer ]  x E    E rows of `rows`

An iteration is one compiled layer of fixed shape, run for each layer: a token for every row that decodes, chunks of
suffixes, and chunks of prefixes that later groups will need (`scheduling`). Groups of similar size run together, so a
run compiles a handful of programs.

Source: the paper for the plan, the order of groups, token batches bounded by memory and the joining of the two parts of
attention. Differs: memory is taken in blocks of fixed shape, and not in pages, so that a row's cache is that of any
policy; the heterogeneous kernel is two calls of `kvjax.attend`.
"""

import dataclasses
import operator
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import kernels, policies
from kvjax.attention import attend
from kvjax.cache import FREE, LayerCache, LayerShape, nbytes
from kvjax.checks import check_params, check_stop
from kvjax.counts import whole
from kvjax.models import llama
from kvjax.models.llama import Block, Config, Params
from kvjax.policy import Policy, check_policy
from kvjax.sampling import make_draw, row_keys, sample
from kvjax.serve.prefix_plan import Group, Plan, ordered, partition, plan
from kvjax.serve.scheduling import Iteration, Scheduler
from kvjax.serve.shapes import bucket

LONGEST_CHUNK = 256  # tokens of a suffix that one iteration reads
MOST_EACH = 32  # rows of a block
MOST_SORTS = 4  # sizes of blocks in a run, if memory allows; each takes up to four programs


class Finished(NamedTuple):
    """A prompt that is done.

    Attributes:
      index: Its place among the prompts.
      tokens: i32[n], what was generated, without the stop token.
      error: Why it was refused; None for the others.
    """

    index: int
    tokens: np.ndarray
    error: str | None = None


@dataclasses.dataclass
class Progress:
    """What a run has done so far; handed to `on_progress` after each iteration, as it is then.

    Attributes:
      prompts: Those in all, and `done`, those finished or refused.
      logical: Tokens of all prompts.
      shared: Those of them that need not be computed again, in the groups that have begun.
      read: Those that were computed.
      generated: Tokens of answers.
      cache_bytes: Of the buffers in use now; `most_bytes`, of the largest.
      programs: Shapes that a layer was compiled for.
      seconds: Since the run began.
    """

    prompts: int
    logical: int
    shared: int
    done: int = 0
    read: int = 0
    generated: int = 0
    cache_bytes: int = 0
    most_bytes: int = 0
    programs: int = 0
    seconds: float = 0.0


def batch(params: Params, prompts: Sequence[Sequence[int]], policy: Policy | None = None, **settings) -> list[Finished]:
    """Answers many prompts, in their order. Takes what `answers` takes, but for `part` and `done`.

    Returns:
      A `Finished` for each prompt.
    """
    if partial := sorted(settings.keys() & {"part", "done"}):
        raise ValueError(f"batch: {' and '.join(partial)} would leave prompts out; kvjax.serve.answers takes them.")
    done = sorted(answers(params, prompts, policy, **settings), key=lambda one: one.index)
    assert [one.index for one in done] == list(range(len(prompts)))
    return done


def answers(
    params: Params,
    prompts: Sequence[Sequence[int]],
    policy: Policy | None = None,
    *,
    prefix_policy: Policy | None = None,
    max_new_tokens: int | Sequence[int] = 64,
    method: str = "exact",
    memory: int = 2**30,
    batch_tokens: int = 2048,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | int | None = None,
    part: tuple[int, int] = (0, 1),
    done: Collection[int] = (),
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[Finished]:
    """Answers many prompts, each as soon as it is done.

    A prompt that cannot be answered (no token ids, too long for the model or for `memory`) is refused by itself.

    Args:
      params: The model.
      prompts: Token ids of each, whole: what they share is found here.
      policy: Of what each prompt has of its own, and its answer; None is `full`. With codecs, what is read is read as
        it is stored, from the first chunk on.
      prefix_policy: Of shared prefixes, which are read alone, so that its choice depends on nothing else; None is
        `full`.
      max_new_tokens: Tokens to generate at most: one number, or one for each prompt.
      method: How prompts are grouped, see `prefix_plan.plan`; "none" shares nothing.
      memory: Bytes that caches may take.
      batch_tokens: Tokens of one iteration.
      stop: Token ids that end an answer.
      temperature: See `kvjax.decode`, as `top_k` and `top_p`.
      top_k: See there.
      top_p: See there.
      key: A seed, a key, or one for each prompt: what is drawn for a prompt does not depend on the others.
      part: (p, n) answers the p-th of n parts of the prompts only, for n machines that each have all prompts. Groups
        stay together, so that a prefix lives on one of them, unless one has more than 1.25 times its share of the
        tokens; all find the same parts.
      done: Prompts that were answered before, and are left out. The parts are those of all prompts.
      on_progress: Called after every iteration.

    Raises:
      ValueError: If arguments do not fit together, or a policy cannot share a prefix.
    """
    check_params(params)
    policy = policies.full() if policy is None else policy
    prefix_policy = policies.full() if prefix_policy is None else prefix_policy
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__"):
        raise ValueError(f"batch: prompts is a {type(prompts).__name__}, and must be a list of lists of token ids.")
    prompts = [_ids(prompt) for prompt in prompts]
    outputs = _outputs(max_new_tokens, len(prompts))
    memory = _bytes(memory)
    batch_tokens = whole("batch", "batch_tokens", batch_tokens, least=16)
    draw, stop = make_draw(temperature, top_k, top_p), set(np.asarray(check_stop(params.config, stop)).tolist())
    keys = row_keys(key, len(prompts))
    if not (isinstance(part, tuple) and len(part) == 2):
        raise ValueError(f"batch: part={part!r} must be (p, n) with p in 0..n-1.")
    mine, parts = (whole("batch", "part", number, least=0) for number in part)
    if not mine < parts:
        raise ValueError(f"batch: part={part} must be (p, n) with p in 0..n-1.")
    shapes = _Shapes(params, policy, prefix_policy, memory, batch_tokens)
    refused = {i: why for i, prompt in enumerate(prompts) if (why := shapes.refusal(prompt, int(outputs[i])))}
    prompts = [np.zeros(0, np.int32) if i in refused else prompt for i, prompt in enumerate(prompts)]
    kept = [i for i in range(len(prompts)) if i not in refused]
    groups = _groups(kept, prompts, outputs, method, mine, parts) if kept else []
    check_shareable(policy, prefix_policy, any(group.prefix_length for group in groups))
    done = set(done)
    left = [Group(length, tuple(i for i in members if i not in done)) for length, members in groups]
    groups = [group for group in left if group.members]
    refused = {i: why for n, (i, why) in enumerate(refused.items()) if n % parts == mine and i not in done}
    return _answers(shapes, groups, refused, prompts, outputs, stop, draw, keys, on_progress)


def _answers(shapes, groups, refused, prompts, outputs, stop, draw, keys, on_progress):
    for i, why in refused.items():
        yield Finished(i, np.zeros(0, np.int32), why)
    logical = sum(len(prompts[i]) for group in groups for i in group.members)
    count = len(refused) + sum(len(group.members) for group in groups)
    progress = Progress(count, logical, 0, done=len(refused))
    began, seen = time.perf_counter(), set()
    for blocks, some in shapes.classes(groups, prompts, outputs):
        run = None  # and its caches, before there are others
        run = _Run(shapes, blocks, some, prompts, outputs, stop, draw, keys)
        progress.shared += sum(group.prefix_length * (len(group.members) - 1) for group in some)
        progress.cache_bytes = run.nbytes
        progress.most_bytes = max(progress.most_bytes, run.nbytes)
        for read, generated, finished in run:
            seen.add(run.shape)
            progress.programs = len(seen)
            progress.read, progress.generated = progress.read + read, progress.generated + generated
            progress.done += len(finished)
            progress.seconds = time.perf_counter() - began
            yield from finished
            if on_progress is not None:
                on_progress(dataclasses.replace(progress))


def _groups(kept, prompts, outputs, method, mine, parts) -> list[Group]:
    """This part's groups of the prompts `kept`, in the order in which they are to run."""
    lengths = [len(prompts[i]) for i in kept]
    if method == "none":
        alone = tuple(Group(0, (i,)) for i in range(len(kept)))
        made = Plan(alone, method, 1, sum(lengths), sum(lengths))
    else:
        made = plan([prompts[i] for i in kept], method=method)
    made = ordered(made, lengths, outputs[kept])
    groups = made.groups
    if parts > 1:
        rank = {i: g for g, group in enumerate(groups) for i in group.members}
        groups = sorted(partition(made, lengths, parts)[mine], key=lambda group: rank[group.members[0]])
    return [Group(group.prefix_length, tuple(kept[i] for i in group.members)) for group in groups]


def check_shareable(policy: Policy, prefix_policy: Policy, shares: bool = True) -> None:
    """Refuses, with the reason, a policy that cannot compress a part of a prompt beside a shared prefix.

    Args:
      policy: Of suffixes and answers.
      prefix_policy: Of prefixes.
      shares: Whether there is a prefix at all.

    Raises:
      ValueError: If one of them cannot.
    """
    for own, of in ((policy, "suffixes"), (prefix_policy, "prefixes")):
        check_policy(own)
        for one in own.layers or (own,):
            if why := _unfit(one, shares, of == "prefixes"):
                raise ValueError(f"batch: {one.name} cannot be used for {of}: {why}.")


def _unfit(policy: Policy, shares: bool, prefix: bool) -> str | None:
    if policy.given:
        return "it wants scores of trained heads, which are computed for one prompt at a time; decode takes it"
    if policy.stepwise != "never" or policy.begins_exactly:
        return "it must see a prompt whole, and batches read prompts in chunks"
    if policy.form is not None:
        return "it keeps every token in the slot of its position, and a suffix does not begin at position 0"
    if shares and policy.ranks is not None:
        return "it numbers tokens by their place in the cache, and a prefix is rotated at its true positions"
    if prefix and policy.low is not None:
        return "a prefix is read as one set of slots, and it has two tiers"
    return None


def _ids(prompt) -> np.ndarray | str:
    """Token ids i64[T] of a prompt, or why they are none."""
    try:
        ids = np.asarray(prompt)
    except ValueError:
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        return f"a prompt must be a list of token ids, and is {prompt!r:.60}"
    return ids.astype(np.int64)


def _bytes(memory) -> int:
    try:
        count = operator.index(memory)
    except TypeError:
        count = 0
    if count < 1 or isinstance(memory, bool):
        raise ValueError(f"batch: memory={memory!r} must be a whole number of bytes, at least 1.")
    return count


def _outputs(given, count: int) -> np.ndarray:
    each = [given] * count if np.ndim(given) == 0 else list(given)
    if len(each) != count:
        raise ValueError(
            f"batch: max_new_tokens has {len(each)} numbers for {count} prompts; give one, or one for each."
        )
    return np.array([whole("batch", "max_new_tokens", one, least=1) for one in each], np.int64)


# Shapes.


class Blocks(NamedTuple):
    """The shape of the buffers of a class of groups.

    Attributes:
      count: Blocks, P: groups in memory at once.
      each: Rows of a block, E.
      prefix: Tokens of a prefix, at most; 0 without prefixes.
      suffix: Tokens of a suffix, at most.
      output: Tokens to generate, at most.
      suffix_lanes: (groups, rows of each, tokens) of the suffixes that an iteration reads.
      prefix_lanes: (prefixes, tokens) that it reads.
    """

    count: int
    each: int
    prefix: int
    suffix: int
    output: int
    suffix_lanes: tuple[int, int, int]
    prefix_lanes: tuple[int, int]


def _coarser(count: int, coarse: int) -> int:
    """The next size: of two between powers of two, of powers of 2, 4, 16 or 256."""
    size = bucket(count)
    if not coarse or not size:
        return size
    octaves = 1 << (coarse - 1)
    return 1 << -(-(size - 1).bit_length() // octaves) * octaves


class _Shapes:
    """Sizes of caches, and which groups run together."""

    def __init__(self, params, policy, prefix_policy, memory, batch_tokens):
        self.params, self.policy, self.prefix_policy = params, policy, prefix_policy
        self.memory, self.batch_tokens = memory, batch_tokens
        self._nbytes: dict[tuple[int, ...], int] = {}

    def refusal(self, prompt: np.ndarray | str, output: int) -> str | None:
        """Why a prompt cannot be answered, or None."""
        if isinstance(prompt, str):
            return prompt
        config, length = self.params.config, len(prompt)
        if length == 0:
            return "the prompt is empty"
        if prompt.min() < 0 or prompt.max() >= config.vocab:
            return f"token {int(prompt.max() if prompt.min() >= 0 else prompt.min())} is not in 0..{config.vocab - 1}"
        if length + output > config.context:
            return f"{length} tokens and {output} to come are more than the model's context of {config.context}"
        if (needs := self.nbytes(0, bucket(length), bucket(output), 1)) > self.memory:
            return f"{length} tokens and {output} to come take {needs} bytes, and memory is {self.memory}"
        return None

    def nbytes(self, prefix: int, suffix: int, output: int, each: int) -> int:
        """Bytes of a block."""
        kind = prefix, suffix, output, each
        if kind not in self._nbytes:
            block = Blocks(1, each, prefix, suffix, output, (), ())
            made = jax.eval_shape(lambda: pools(self.params, self.policy, self.prefix_policy, block))
            self._nbytes[kind] = nbytes(made)
        return self._nbytes[kind]

    def classes(self, groups, prompts, outputs) -> Iterator[tuple[Blocks, list[Group]]]:
        """Groups of one size at a time, in the order of their first ones; those without a prefix are packed."""
        for (prefix, suffix, output), own in self._sorts(groups, prompts, outputs).items():
            members = [len(group.members) for group in own]
            if not prefix:  # singletons: a block of rows that share nothing
                each = max(1, min(MOST_EACH, self.memory // self.nbytes(0, suffix, output, 1), sum(members)))
                loners = [i for group in own for i in group.members]
                own = [Group(0, tuple(loners[at : at + each])) for at in range(0, len(loners), each)]
                members = [len(group.members) for group in own]
            each = min(MOST_EACH, 1 << (max(1, -(-sum(members) // len(members))) - 1).bit_length())
            while each > 1 and self.nbytes(prefix, suffix, output, each) > self.memory:
                each //= 2
            bytes_of_block = self.nbytes(prefix, suffix, output, each)
            if bytes_of_block > self.memory:  # the prefix and a row do not fit together: they go unshared
                yield from self.classes([Group(0, (i,)) for group in own for i in group.members], prompts, outputs)
                continue
            count = max(1, min(len(own), self.memory // bytes_of_block, self.batch_tokens // each))
            longest = max(len(prompts[i]) - group.prefix_length for group in own for i in group.members)
            yield self.blocks(count, each, prefix, suffix, output, longest), own

    def _sorts(self, groups, prompts, outputs) -> dict[tuple[int, int, int], list[Group]]:
        """Groups by the sizes that they are rounded up to: as coarse as it takes for few sorts, if they fit so."""
        sizes = [
            (
                group.prefix_length,
                max(len(prompts[i]) for i in group.members) - group.prefix_length,
                max(outputs[i] for i in group.members),
            )
            for group in groups
        ]
        found = None
        for coarse in range(5):
            sorts: dict[tuple[int, int, int], list[Group]] = {}
            for group, own in zip(groups, sizes, strict=True):
                sorts.setdefault(tuple(_coarser(count, coarse) for count in own), []).append(group)
            if found is not None and any(self.nbytes(*kind, 1) > self.memory for kind in sorts):
                break
            found = sorts
            if len(sorts) <= MOST_SORTS:
                break
        return found

    def blocks(self, count, each, prefix, suffix, output, longest) -> Blocks:
        half = self.batch_tokens // 2
        pieces = -(-longest // min(LONGEST_CHUNK, half))
        tokens = -(-longest // pieces // 8) * 8 if pieces > 1 else min(bucket(longest), half)
        rows = min(each, max(1, half // tokens))
        at_once = max(1, min(count, half // tokens // rows))
        chunk = max(16, min(prefix, half))
        return Blocks(
            count, each, prefix, suffix, output, (at_once, rows, tokens), (max(1, min(count, half // chunk)), chunk)
        )


def pools(params: Params, policy: Policy, prefix_policy: Policy, blocks: Blocks):
    """Free slots: (`prefixes` of P rows or None, `rows` of P E rows) of each layer."""
    config = params.config

    def free(own, i, rows, tokens, room):
        shape = LayerShape(rows, config.kv_heads, own.capacity(tokens, room), config.head_dim, params.embed.dtype, i)
        return own.empty(shape)

    layers = zip(prefix_policy.of_layers(config.layers), policy.of_layers(config.layers), strict=True)
    return [
        (
            free(theirs, i, blocks.count, blocks.prefix, 0) if blocks.prefix else None,
            free(own, i, blocks.count * blocks.each, blocks.suffix, blocks.output),
        )
        for i, (theirs, own) in enumerate(layers)
    ]


# The compiled part.


class Lanes(NamedTuple):
    """Chunks of prompts in one iteration; E rows of each of A groups.

    Attributes:
      tokens: i32[A, E, T].
      positions: i32[A, E, T]; -1 for padding.
      part: i32[A], the row of `prefixes` that they follow.
      row: i32[A, E], the row that they are written into; beyond the last for none.
      begins: bool[A, E], whether that row starts anew.
    """

    tokens: jax.Array
    positions: jax.Array
    part: jax.Array
    row: jax.Array
    begins: jax.Array


class Work(NamedTuple):
    """An iteration: for each row a token and its position i32[B], -1 for none; and chunks, or None."""

    token: jax.Array
    position: jax.Array
    suffixes: Lanes | None
    prefixes: Lanes | None

    @property
    def tokens(self) -> jax.Array:
        """All tokens i32[1, N]: those that decode, of suffixes, of prefixes."""
        return self._joined(self.token, "tokens")

    @property
    def positions(self) -> jax.Array:
        """Their positions i32[1, N]."""
        return self._joined(self.position, "positions")

    def _joined(self, first: jax.Array, name: str) -> jax.Array:
        lanes = [getattr(own, name).reshape(-1) for own in (self.suffixes, self.prefixes) if own is not None]
        return jnp.concatenate([first, *lanes])[None]


@jax.jit
def _embed(params: Params, work: Work):
    angles = params.config.rope.angles(work.positions, params.config.head_dim)
    return llama.embed(params, jnp.maximum(work.tokens, 0)), angles


def _layer(
    block: Block,
    x: jax.Array,
    prefixes: LayerCache | None,
    rows: LayerCache,
    work: Work,
    angles: tuple[jax.Array, jax.Array],
    layer: int,
    policy: Policy,
    prefix_policy: Policy,
    config: Config,
):
    """One layer of an iteration: x [1, N, width], and the layer's caches."""
    made = llama.project(block, x, config, work.positions)
    decoding = work.token.shape[0]
    settings = {"rope": config.rope, "sliding_window": config.sliding_window, "layer": layer}

    def part(start, *shape):  # q, k, v and angles of the tokens from `start`
        count = int(np.prod(shape))
        q, k, v, cos, sin = (
            y[0, start : start + count].reshape(*shape, *y.shape[2:]) for y in (made.q, made.k, made.v, *angles)
        )
        return (q, k, v), (cos, sin)

    def chunks(start, lanes, cache, own, prefix):
        shape = lanes.row.size, lanes.tokens.shape[-1]
        vectors, turned = part(start, *shape)
        held = _begun(_rows(cache, lanes.row.reshape(-1), own), lanes.begins.reshape(-1), own, layer)
        out, held = attend(
            *vectors, held, own, positions=lanes.positions.reshape(shape), angles=turned, capacity=cache.capacity,
            prefix=prefix, **settings,
        )  # fmt: skip
        return out.reshape(-1, *out.shape[2:]), _with_rows(cache, lanes.row.reshape(-1), held, own)

    vectors, turned = part(0, decoding, 1)
    out, rows = attend(
        *vectors, rows, policy, positions=work.position[:, None], angles=turned, prefix=prefixes, **settings
    )
    outs = [out[:, 0]]
    if work.suffixes is not None:
        shared = None if prefixes is None else _rows(prefixes, work.suffixes.part, prefix_policy)
        out, rows = chunks(decoding, work.suffixes, rows, policy, shared)
        outs.append(out)
    if work.prefixes is not None:
        start = decoding + (0 if work.suffixes is None else work.suffixes.tokens.size)
        out, prefixes = chunks(start, work.prefixes, prefixes, prefix_policy, None)
        outs.append(out)
    return llama.finish(block, x, jnp.concatenate(outs)[None], config), prefixes, rows


_layer_in_place = kernels.jit(_layer, static_argnames=("config",), donate_argnames=("prefixes", "rows"))


def _of_rows(cache: LayerCache, policy: Policy) -> LayerCache:
    """Of each leaf of a layer, whether it has something of each row."""
    batch, heads = cache.pos.shape[:2]
    head_dim = jax.eval_shape(policy.loaded, cache).v.shape[-1]

    def shapes(rows):
        return jax.eval_shape(lambda: policy.empty(LayerShape(rows, heads, cache.capacity, head_dim, cache.dtype, 0)))

    return jax.tree.map(lambda one, more: one.shape != more.shape, shapes(batch), shapes(batch + 1))


def _rows(cache: LayerCache, index: jax.Array, policy: Policy) -> LayerCache:
    """Some rows of a layer; an index beyond the last gives any of them."""
    index = jnp.minimum(index, cache.pos.shape[0] - 1)
    return jax.tree.map(lambda leaf, own: leaf[index] if own else leaf, cache, _of_rows(cache, policy))


def _with_rows(cache: LayerCache, index: jax.Array, rows: LayerCache, policy: Policy) -> LayerCache:
    """The layer with rows put in their places; those beyond the last are dropped."""

    def put(old, new, own):
        return old.at[index].set(new, mode="drop") if own else new

    return jax.tree.map(put, cache, rows, _of_rows(cache, policy))


def _begun(rows: LayerCache, begins: jax.Array, policy: Policy, layer) -> LayerCache:
    """The rows, where those that begin are empty."""
    batch, heads = rows.pos.shape[:2]
    head_dim = jax.eval_shape(policy.loaded, rows).v.shape[-1]
    of_rows = _of_rows(rows, policy)
    fresh = policy.empty(LayerShape(batch, heads, rows.capacity, head_dim, rows.dtype, layer))

    def anew(old, new, own):
        return jnp.where(begins.reshape(-1, *(1,) * (old.ndim - 1)), new, old) if own else old

    return jax.tree.map(anew, rows, fresh, of_rows)  # values, too: a nan in a free slot would spread


@jax.jit
def _sample(params: Params, x: jax.Array, work: Work, keys: jax.Array, who: jax.Array, draw):
    """The next token of each row that decodes, and of each lane of suffixes: i32[B + A E]."""
    ends, positions = jnp.arange(work.token.shape[0]), work.position
    if work.suffixes is not None:
        at = work.suffixes.positions
        last = jnp.maximum((at >= 0).sum(axis=-1) - 1, 0).reshape(-1)
        begin = work.token.shape[0] + jnp.arange(last.size) * at.shape[-1]
        ends, positions = (
            jnp.concatenate([ends, begin + last]),
            jnp.concatenate([positions, at.max(axis=-1).reshape(-1)]),
        )
    return sample(llama.logits(params, x[0, ends]), draw, keys[who], positions + 1)


# The host's part.


class _Run:
    """One class of groups; iterate over it: tokens read and generated, and what finished, of each iteration."""

    def __init__(self, shapes, blocks, groups, prompts, outputs, stop, draw, keys):
        self.params, self.policies = shapes.params, (shapes.policy, shapes.prefix_policy)
        self.blocks, self.groups, self.prompts, self.outputs = blocks, groups, prompts, outputs
        self.stop, self.draw, self.keys = stop, draw, keys
        self.group_of = {i: g for g, group in enumerate(groups) for i in group.members}
        suffixes = {i: len(prompts[i]) - group.prefix_length for group in groups for i in group.members}
        self.scheduler = Scheduler(
            groups,
            [suffixes.get(i, 1) for i in range(len(prompts))],
            outputs,
            batch_tokens=shapes.batch_tokens,
            memory=2**31 - 1,  # blocks bound it, and are as many as fit
            max_resident_groups=blocks.count,
            rows_per_group=blocks.each,
            suffix_lanes=blocks.suffix_lanes,
            prefix_lanes=blocks.prefix_lanes,
        )
        self.caches = pools(self.params, *self.policies, blocks)
        self.nbytes = nbytes(self.caches)
        self.block_of: dict[int, int] = {}
        self.free_blocks = list(range(blocks.count))[::-1]
        self.row_of: dict[int, int] = {}
        self.free_rows = {b: list(range(blocks.each))[::-1] for b in range(blocks.count)}
        self.left = {g: len(group.members) for g, group in enumerate(groups)}
        self.said: dict[int, list[int]] = {}
        self.shape = None

    def __iter__(self):
        while (iteration := self.scheduler.next()) is not None:
            yield self._iterate(iteration)

    def _iterate(self, iteration: Iteration):
        for chunk in iteration.prefixes:
            self._block(chunk.owner)
        for chunk in iteration.suffixes:
            self._row(chunk.owner)
        work, who, asked = self._work(iteration)
        self.shape = (self.blocks, work.suffixes is None, work.prefixes is None)
        tokens = self._run(work, who)
        ended, finished = [], []
        for i, place in asked.items():
            token = int(tokens[place])
            if token in self.stop:
                ended.append(i)
            else:
                self.said.setdefault(i, []).append(token)
            if token in self.stop or len(self.said[i]) == self.outputs[i]:
                finished.append(Finished(i, np.array(self.said.pop(i, []), np.int32)))
                self._release(i)
        self.scheduler.ended(ended)
        read = sum(chunk.count for chunk in (*iteration.suffixes, *iteration.prefixes))
        return read, len(asked) - len(ended), finished

    def _run(self, work: Work, who: np.ndarray) -> np.ndarray:
        config = self.params.config
        own, theirs = (policy.of_layers(config.layers) for policy in self.policies)
        work = jax.device_put(work)  # once, and not for each layer
        x, angles = _embed(self.params, work)
        for i, block in enumerate(self.params.blocks):
            prefixes, rows = self.caches[i]
            self.caches[i] = None  # donated
            x, prefixes, rows = _layer_in_place(block, x, prefixes, rows, work, angles, i, own[i], theirs[i], config)
            self.caches[i] = prefixes, rows
        return np.asarray(_sample(self.params, x, work, self.keys, who, self.draw))

    def _work(self, iteration: Iteration) -> tuple[Work, np.ndarray, dict[int, int]]:
        """The iteration as arrays; the prompt of each row and lane; where the next token of a prompt will stand."""
        count, each = self.blocks.count, self.blocks.each
        token, position = np.zeros(count * each, np.int32), np.full(count * each, FREE, np.int32)
        who, asked = [0] * (count * each), {}
        for i in iteration.decode:
            row = self.row_of[i]
            token[row], position[row] = self.said[i][-1], len(self.prompts[i]) + len(self.said[i]) - 1
            who[row], asked[i] = i, row
        suffixes = prefixes = None
        if iteration.suffixes:
            suffixes, places = self._suffixes(iteration.suffixes)
            for chunk, place in zip(iteration.suffixes, places, strict=True):
                i = chunk.owner
                if self._prefix_of(i) + chunk.start + chunk.count == len(self.prompts[i]):
                    asked[i] = count * each + place
            owners = dict(zip(places, (chunk.owner for chunk in iteration.suffixes), strict=True))
            who += [owners.get(place, 0) for place in range(suffixes.row.size)]
        if iteration.prefixes:
            prefixes = self._prefixes(iteration.prefixes)
        return Work(token, position, suffixes, prefixes), np.array(who, np.int32), asked

    def _suffixes(self, chunks) -> tuple[Lanes, list[int]]:
        parts, each, tokens = self.blocks.suffix_lanes
        lanes = _empty_lanes(parts, each, tokens, beyond=self.blocks.count * self.blocks.each)
        blocks, places, used = {}, [], {}
        for chunk in chunks:
            group = self.group_of[chunk.owner]
            a = blocks.setdefault(group, len(blocks))
            e = used[group] = used.get(group, -1) + 1
            lanes.part[a] = self.block_of[group]
            self._fill(lanes, (a, e), self.row_of[chunk.owner], chunk, chunk.owner, self._prefix_of(chunk.owner))
            places.append(a * each + e)
        return lanes, places

    def _prefixes(self, chunks) -> Lanes:
        count, tokens = self.blocks.prefix_lanes
        lanes = _empty_lanes(count, 1, tokens, beyond=self.blocks.count)
        for a, chunk in enumerate(chunks):
            self._fill(lanes, (a, 0), self.block_of[chunk.owner], chunk, self.groups[chunk.owner].members[0], 0)
        return lanes

    def _fill(self, lanes: Lanes, place, row: int, chunk, prompt: int, offset: int) -> None:
        start = offset + chunk.start
        lanes.row[place], lanes.begins[place] = row, chunk.start == 0
        lanes.tokens[place][: chunk.count] = self.prompts[prompt][start : start + chunk.count]
        lanes.positions[place][: chunk.count] = np.arange(start, start + chunk.count)

    def _prefix_of(self, i: int) -> int:
        return self.groups[self.group_of[i]].prefix_length

    def _block(self, group: int) -> int:
        if group not in self.block_of:
            self.block_of[group] = self.free_blocks.pop()
        return self.block_of[group]

    def _row(self, i: int) -> int:
        if i not in self.row_of:
            block = self._block(self.group_of[i])
            self.row_of[i] = block * self.blocks.each + self.free_rows[block].pop()
        return self.row_of[i]

    def _release(self, i: int) -> None:
        group, row = self.group_of[i], self.row_of.pop(i)
        self.free_rows[row // self.blocks.each].append(row % self.blocks.each)
        self.left[group] -= 1
        if not self.left[group]:
            self.free_blocks.append(self.block_of.pop(group))


def _empty_lanes(parts: int, each: int, tokens: int, beyond: int) -> Lanes:
    return Lanes(
        np.zeros((parts, each, tokens), np.int32),
        np.full((parts, each, tokens), FREE, np.int32),
        np.zeros(parts, np.int32),
        np.full((parts, each), beyond, np.int32),
        np.zeros((parts, each), bool),
    )
