"""Methods side by side on one model: facts found, agreement on prose, bytes, speed.

Every policy meets the same keys and values: one prefill computes them, and each policy compresses its own copy, layer
by layer, before any question is known. Layers run as programs of their own, so that a policy costs a second of
compilation and not ten.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import policies, tasks
from kvjax.cache import Cache, LayerShape
from kvjax.counts import real, whole
from kvjax.decoding import prefill, run_layer_in_place, step_with
from kvjax.models.llama import Params
from kvjax.models.weights import Model
from kvjax.policy import Policy
from kvjax.report import report


class Target(NamedTuple):
    """How small a context is to become: to the bytes of `budget` slots of a full cache.

    Attributes:
      budget: Slots a head.
      tokens: Of a context.
      head_dim: The model's.
      number: Bytes of a number.
    """

    budget: int
    tokens: int
    head_dim: int = 64
    number: int = 4

    @property
    def bytes(self) -> float:
        """Of one head."""
        return self.budget * self.slot(0)

    def slot(self, statistics: int) -> float:
        """Bytes of a slot at full width, with so many numbers of f32 beside its position."""
        return 2 * self.head_dim * self.number + 4 + 4 * statistics

    def slot_of_integers(self, bits: int, group: int = 32) -> float:
        """Bytes of a slot whose key and value are rounded."""
        return 2 * (self.head_dim * bits / 8 + 4 * self.head_dim / group) + 4


AT_BUDGET: dict[str, Callable[[Target], Policy | None]] = {  # None where a method cannot be so small
    "full": lambda to: policies.full(),
    "streaming_llm": lambda to: policies.streaming_llm(to.budget),
    "h2o": lambda to: policies.h2o(to.budget, window=to.budget // 2),
    "snapkv": lambda to: policies.snapkv(to.budget, window=min(64, to.budget // 2)),
    "d2o": lambda to: policies.d2o(to.budget, window=to.budget // 2),
    "cam": lambda to: policies.cam(to.budget),
    "compactor": lambda to: policies.compactor(to.budget),
    "ems": lambda to: policies.ems(to.budget + 1 - _few(to.budget), window=_few(to.budget)),
    "kvmerger": lambda to: _kvmerger(to.budget + 1 - _few(to.budget), _few(to.budget), to.budget / to.tokens),
    "elastic_cache": lambda to: policies.elastic_cache(1 - to.budget / to.tokens),
    "expected_attention": lambda to: policies.expected_attention(
        to.budget, window=min(64, to.budget // 2), sinks=min(4, to.budget // 4)
    ),
    "think": lambda to: _think(to),
    "mikv": lambda to: _mikv(to),
    "kivi": lambda to: _kivi(to),
    "locret": lambda to: _locret(to),
    "attention_gate": lambda to: policies.attention_gate(max(1, int(to.bytes / to.slot(1)))),
    "tova": lambda to: policies.tova(to.budget),
    "keydiff": lambda to: policies.keydiff(to.budget),
    "random": lambda to: policies.random(to.budget),
}


def _few(budget: int) -> int:
    """Tokens between two compressions, of methods that compress now and then; their slots count as budget."""
    return max(1, min(32, budget // 4))


def _kvmerger(budget: int, every: int, share: float) -> Policy:
    """With the parts of the budget that the paper leaves alone: those of its 50 %, or of its 35 %."""
    window, heavy = (0.34, 0.24) if share > 0.4 else (0.23, 0.057)
    return policies.kvmerger(budget, window=max(1, round(window * budget)), heavy=round(heavy * budget), every=every)


def _think(to: Target) -> Policy | None:
    """H2O, of whose older keys half the channels stay: a quarter more tokens than in H2O alone."""
    recent, channels = min(32, max(to.budget // 4, 1)), to.head_dim // 2
    narrow = to.slot(1) - (to.head_dim - channels) * to.number
    older = int((to.bytes - (recent + 1) * to.slot(1)) // narrow) - 1
    if older < 2 or channels < 1:
        return None
    return policies.think(channels, recent=recent, tokens=policies.h2o(older, window=max(older // 2, 1)))


def _mikv(to: Target) -> Policy | None:
    """As many bits for the low tier as leave a fiftieth of the tokens, or more, at full precision."""
    share, high = to.bytes / to.tokens, to.slot(1)
    group = math.gcd(to.head_dim, 32)
    for bits in (8, 4, 3, 2):
        low = to.slot_of_integers(bits, group)
        if low >= high:  # steps of small groups take more than rounding saves
            continue
        ratio = int(1000 * (share - low) / (high - low)) / 1000
        if ratio >= 0.02:
            return policies.mikv(min(ratio, 1.0), low_bits=bits, group=group)
    return None


def _kivi(to: Target) -> Policy | None:
    """As many bits as there is room for, and then as many whole tokens."""
    group = math.gcd(to.head_dim, 32)
    for bits in (8, 4, 3, 2):
        if to.head_dim * bits % 32:  # channels must fill words
            continue
        for residual in (128, 64, 32):
            full = (2 * residual + 1) * to.head_dim * to.number
            if to.tokens * to.slot_of_integers(bits, group) + full <= to.bytes:
                return policies.kivi(bits, group=group, residual=residual)
    return None


def _locret(to: Target) -> Policy | None:
    """Slots for a tail as long as a question and a part of the answer; what is left is for the heads to choose.

    Sinks and many newest tokens cost facts and save prose: at 1/8 of 1000 tokens, without sinks and with 16 of the
    newest, heads half trained found 9 facts of 24 at a KL of 0.55 nats, and as here 8 at 0.21.
    """
    tail, every = max(1, min(24, to.budget // 5)), max(1, min(8, to.budget // 10))
    budget = int(to.bytes / to.slot(2)) + 1 - tail - every
    if budget < 10:
        return None
    return policies.locret(budget, stabilizers=min(40, budget // 2), sinks=4, tail=tail, every=every)


PROMPT = "Read this text and remember it.\n\n{context}\n\n"
CHUNK = 256  # tokens that are read at once where a method is made for it
QUESTION_TOKENS = 64  # of a question and its answer, about
ANSWER_TOKENS = 18  # "The secret code of Nairobi is 1234567" and a little more


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured. The default ends within minutes on two CPU cores; more of anything is less noise.

    Attributes:
      tokens: Tokens of a context, about.
      fractions: Budgets, as fractions of `tokens`.
      contexts: Contexts with hidden facts.
      per_kind: Facts, and questions, of each kind in a context.
      prose: Rows of prose.
      forced: Tokens of each that are predicted with the compressed cache.
      group: Rows that are read at once.
      seed: Of facts, places and prose.
    """

    tokens: int = 1000
    fractions: tuple[float, ...] = (1 / 2, 1 / 4, 1 / 8)
    contexts: int = 4
    per_kind: int = 2
    prose: int = 4
    forced: int = 32
    group: int = 4
    seed: int = 0

    def __post_init__(self):
        least = {"tokens": 1, "contexts": 1, "per_kind": 1, "prose": 1, "forced": 4, "group": 1, "seed": 0}
        for name, bound in least.items():
            whole("compare", name, getattr(self, name), least=bound)
        most = min(len(kind.keys) for kind in tasks.KINDS)
        if self.per_kind > most:
            raise ValueError(f"compare: per_kind={self.per_kind} is above {most}, the facts that a kind has.")
        if self.contexts % self.group or self.prose % self.group:
            raise ValueError(
                f"compare: contexts={self.contexts} and prose={self.prose} must be multiples of group={self.group}, "
                f"the rows that are read at once."
            )
        for fraction in self.fractions:
            real("compare", "fractions", fraction, above=0, most=1, mend="They are shares of `tokens`, such as 1/4.")


@dataclasses.dataclass
class Row:
    """A line of the table: a method at a budget.

    Attributes:
      method: Its name.
      budget: Slots a head; the context's tokens for `full`.
      policy: The policy.
      scores: Share of the questions answered, by kind of fact.
      kl: Mean KL(full || compressed) over the tokens of prose, in nats.
      top1: Share of the tokens of prose at which both find the same likeliest token.
      bytes: Of the cache of one context, once compressed.
      share: The same, of a full cache.
      prefill_speed: Prompt tokens per second, one row.
      decode_speed: Tokens per second, `Size.group` rows together, each layer a program of its own (see above); the one
        program of `kvjax.decode` is faster, and what benchmarks measure.
    """

    method: str
    budget: int
    policy: Policy
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    kl: float = 0.0
    top1: float = 1.0
    bytes: float = 0.0
    share: float = 1.0
    prefill_speed: float = 0.0
    decode_speed: float = 0.0

    @property
    def score(self) -> float:
        """Mean of the scores."""
        return float(np.mean(list(self.scores.values())))


def compare(
    model: Model, methods: Sequence[str], size: Size, advance: Callable[[str, int, int], None] = lambda *_: None
) -> list[Row]:
    """Measures `methods`, `full` before all others, and returns a row for each method and budget.

    Args:
      model: The model.
      methods: Names, of `AT_BUDGET`.
      size: How much is measured.
      advance: Called with (what is being done, steps done, steps in all).

    Raises:
      ValueError: If a method has no such name, a budget is too small for it, or the model has no
        tokenizer or too short a context.
    """
    plan(methods, size)  # refuses what no model can do
    check_fits(model, size)
    return measure(model, plan(methods, size, model.config.head_dim, model.params.embed.dtype.itemsize), size, advance)


def measure(
    model: Model, rows: list[Row], size: Size, advance: Callable[[str, int, int], None] = lambda *_: None
) -> list[Row]:
    """Fills in what `rows` say of their policies, the first of which is `full`, and returns them; see `compare`."""
    if any(row.policy.given for row in rows):
        from kvjax import heads  # late: flax

        model = dataclasses.replace(model, params=heads.with_heads_for(model.params, [row.policy for row in rows]))
    speeds = {row.method for row in rows}
    groups = (size.contexts + size.prose) // size.group
    steps = groups * (len(rows) + 2) + len(speeds)
    done = iter(range(1, steps + 1))

    def tick(what):
        advance(what, next(done), steps)

    _measure_facts(model, rows, size, tick)
    _measure_prose(model, rows, size, tick)
    _measure_prefill(model, rows, size, tick)
    return rows


def trained(model: Model, methods: Sequence[str]) -> list[str]:
    """Those of `methods` that need no trained heads, or heads that this model has."""
    from kvjax import heads

    def has(name):
        try:
            heads.with_heads_for(model.params, [row.policy for row in plan([name], Size())])
        except ValueError:
            return False
        return True

    return [name for name in methods if has(name)]


def check_fits(model: Model, size: Size) -> None:
    """Refuses a model that cannot do what is to be measured. Raises ValueError as `compare` does."""
    if model.tokenizer is None:
        raise ValueError("compare: this checkpoint came without a tokenizer, and the tasks are text.")
    if size.tokens + max(size.forced, QUESTION_TOKENS) > model.config.context:
        raise ValueError(
            f"compare: tokens={size.tokens} and what follows do not fit the model's context of {model.config.context} "
            f"tokens. Give fewer."
        )


def plan(methods: Sequence[str], size: Size, head_dim: int = 64, number: int = 4) -> list[Row]:
    """The rows that are to be measured, `full` first, for a model with `number` bytes a number.

    A method that cannot be so small has no row at that budget. Raises ValueError as `compare` does.
    """
    unknown = [name for name in methods if name not in AT_BUDGET]
    if unknown:
        raise ValueError(f"compare: there is no method {unknown[0]!r}; there are {', '.join(AT_BUDGET)}.")
    budgets = [round(size.tokens * fraction) for fraction in size.fractions]
    rows = [Row("full", size.tokens, policies.full())]
    for name in methods:
        made = [(budget, AT_BUDGET[name](Target(budget, size.tokens, head_dim, number))) for budget in budgets]
        rows += [Row(name, budget, policy) for budget, policy in made if policy is not None and name != "full"]
    return rows


def _measure_facts(model: Model, rows: list[Row], size: Size, tick) -> None:
    def encode(text):
        return model.tokenizer.encode(text, add_special_tokens=False).ids

    before, after = _frame(model)
    contexts = list(
        tasks.fact_contexts(
            lambda text: len(encode(text)),
            contexts=size.contexts,
            tokens=size.tokens - len(encode(before + PROMPT)),
            per_kind=size.per_kind,
            seed=size.seed,
        )
    )
    prompts, lengths = model.encode(
        [before + PROMPT.format(context=context.text) for context in contexts], add_special_tokens=False
    )
    asked, asked_lengths = model.encode(
        [question.text + after for context in contexts for question in context.questions], add_special_tokens=False
    )
    each = len(contexts[0].questions)
    found = {id(row): {} for row in rows}
    for at in range(0, size.contexts, size.group):
        group = slice(at, at + size.group)
        questions = [question for context in contexts[group] for question in context.questions]
        some = slice(at * each, (at + size.group) * each)
        for row, (_, cache) in _compressed(model.params, rows, prompts[group], lengths[group], tick):
            held = report(cache)
            row.bytes, row.share = held.total / size.group, held.total / held.full
            cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, each, axis=0) if leaf.ndim else leaf, cache)
            answers = _answer(model, row.policy, cache, asked[some], asked_lengths[some])
            for question, said in zip(questions, answers, strict=True):
                found[id(row)].setdefault(question.kind, []).append(question.score(said))
            tick(f"facts: {row.policy}")
    for row in rows:
        row.scores = {kind: float(np.mean(scores)) for kind, scores in found[id(row)].items()}


def _frame(model: Model) -> tuple[str, str]:
    """What stands before and after a user's message in the model's chat template."""
    if model.chat_template is None:
        return "", "\nAnswer:"
    before, after = model.chat("\0").split("\0")
    return before, after


def _answer(model: Model, policy: Policy, cache: Cache, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Reads a question a row and answers it, greedily."""
    logits, cache = prefill(model.params, policy, tokens, lengths=lengths, cache=cache, room=ANSWER_TOKENS)
    said = [[] for _ in lengths]
    alive = np.ones(len(lengths), bool)
    for _ in range(ANSWER_TOKENS):
        token = np.asarray(jnp.argmax(logits, axis=-1))
        alive &= ~np.isin(token, model.stop_tokens)
        if not alive.any():
            break
        for answer, one, going in zip(said, token, alive, strict=True):
            answer.extend([one] if going else [])
        token = jnp.asarray(np.where(alive, token, -1), jnp.int32)
        logits, cache = step_with(run_layer_in_place, model.params, policy, token, cache)
    return [model.decode(answer) for answer in said]


def _measure_prose(model: Model, rows: list[Row], size: Size, tick) -> None:
    def encode(text):
        return model.tokenizer.encode(text, add_special_tokens=False).ids

    texts = tasks.prose_rows(encode, rows=size.prose, tokens=size.tokens + size.forced, seed=size.seed)
    kl, top1, seconds = ({id(row): [] for row in rows} for _ in range(3))
    for at in range(0, size.prose, size.group):
        text = texts[at : at + size.group]
        reference = None
        prompts, lengths = text[:, : size.tokens], np.full(size.group, size.tokens, np.int32)
        for row, (logits, cache) in _compressed(model.params, rows, prompts, lengths, tick, room=size.forced):
            said, took = _force(model.params, row.policy, logits, cache, text[:, size.tokens :])
            reference = said if reference is None else reference  # `full` is the first row
            divergence, same = _agreement(reference, said)
            kl[id(row)].append(float(divergence))
            top1[id(row)].append(float(same))
            seconds[id(row)] += took
            tick(f"prose: {row.policy}")
    for row in rows:
        row.kl, row.top1 = float(np.mean(kl[id(row)])), float(np.mean(top1[id(row)]))
        row.decode_speed = size.group / float(np.median(seconds[id(row)]))


def _force(params, policy, logits, cache, tokens) -> tuple[jax.Array, list[float]]:
    """Logits f32[forced, B, V] that predict `tokens` i32[B, forced], and the seconds of each step but the first two."""
    said, seconds = [logits], []
    for token in tokens.T[:-1]:
        start = time.perf_counter()
        logits, cache = step_with(run_layer_in_place, params, policy, jnp.asarray(token), cache)
        said.append(jax.block_until_ready(logits))
        seconds.append(time.perf_counter() - start)
    return jnp.stack(said), seconds[2:]  # compilation, and a first run


@jax.jit
def _agreement(reference: jax.Array, said: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean KL(reference || said) in nats and share of equal likeliest tokens; both are logits f32[..., V]."""
    p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(said)
    return (jnp.exp(p) * (p - q)).sum(axis=-1).mean(), (reference.argmax(-1) == said.argmax(-1)).mean()


def _measure_prefill(model: Model, rows: list[Row], size: Size, tick) -> None:
    tokens = np.resize(np.arange(1000, 2000, dtype=np.int32), (1, size.tokens)) % model.config.vocab
    speeds = {}
    for row in rows:
        if row.method not in speeds:
            read = functools.partial(prefill, policy=row.policy, tokens=tokens, chunk=_chunk(row.policy))
            jax.block_until_ready(read(_first_layer(model.params)))  # compiles
            start = time.perf_counter()
            jax.block_until_ready(read(model.params))
            speeds[row.method] = size.tokens / (time.perf_counter() - start)
            tick(f"speed of prefill: {row.method}")
        row.prefill_speed = speeds[row.method]


def _first_layer(params: Params) -> Params:
    """The model cut after its first layer: its programs are those of every layer."""
    heads = {name: each[:1] for name, each in params.heads.items()}
    return dataclasses.replace(params, blocks=params.blocks[:1], heads=heads)


def _chunk(policy: Policy) -> int | None:
    return CHUNK if policy.tail else None


def _compressed(params, rows, tokens, lengths, tick, room: int = 0) -> Iterator[tuple[Row, tuple[jax.Array, Cache]]]:
    """Each row's logits and cache after a prompt, read once for all policies that cache the same keys.

    Those that choose before, or while, a layer attends make other keys for the next one, and read it by themselves.
    """
    for renumbered in (False, True):
        some = [row for row in rows if not row.policy.given and (row.policy.ranks is not None) == renumbered]
        if not some:
            tick("reading")
            continue
        logits, cache = prefill(
            params, _together(tuple(row.policy for row in some)), tokens, lengths=lengths, room=room
        )
        jax.block_until_ready(logits)
        tick("reading")
        layers = list(cache.layers)
        for i, row in enumerate(some):
            own = Cache(tuple(layer[i] for layer in layers), cache.length, row.policy, params.config)
            layers = [(*layer[:i], None, *layer[i + 1 :]) for layer in layers]  # so that it is freed when it is done
            yield row, (logits, own)
    for row in rows:
        if row.policy.given:
            yield row, prefill(params, row.policy, tokens, lengths=lengths, room=room, chunk=_chunk(row.policy))


@functools.cache
def _together(several: tuple[Policy, ...]) -> Policy:
    """One policy for a single prefill, whose layers are tuples: what each of `several` makes of the same tokens."""

    def init(shape):
        return dataclasses.replace(several[0].init(shape), stats={}, carry=shape.layer)

    def update(cache, seen, capacity):
        batch, heads, slots, head_dim = cache.k.shape
        shape = LayerShape(batch, heads, slots, head_dim, cache.k.dtype, cache.carry)

        def alone(policy):
            fresh = policy.init(shape)
            low = policy.empty(dataclasses.replace(shape, slots=0)).low
            own = dataclasses.replace(cache, stats=fresh.stats, carry=fresh.carry, low=low, made_by=policy)
            return policy.first(own, seen, policy.capacity(capacity))

        return tuple(alone(policy) for policy in several)

    needs = frozenset().union(*(policy.needs for policy in several))
    return Policy("together", None, needs, init, update, several[0].ranks)
