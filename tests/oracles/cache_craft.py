"""Cache-Craft: chunks of a prompt cached in one context, used in another, and computed again where that matters most.

Source: Agarwal et al. 2025, arXiv:2502.15734, which has no released code; reconstructions: an isolated chunk fits
nothing, the exact flag, the use score, the focus rule, the system prompt outside all statistics. The other choice of
tokens is CacheBlend's, Yao et al. 2024, arXiv:2405.16444, in the form of its code; the order of its stages in the
paper is read here. The layer plan and the two parts of one attention are plain arithmetic.

A request is a list of Parts in order of position; a row is a token's position in the request. Keys are stored before
rotation. The model runs row by row over one stream.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.oracles import common

# ---- statistics of a chunk, taken when it is computed in full ----

Attention = Sequence  # [layer][query row][key row], the mean over heads; a layer is an array or a dict of rows
Span = range  # the rows of one chunk


@dataclass(frozen=True)
class Statistics:
    """What a variant remembers of the context it was computed in. `inter` is I_j, one for each earlier chunk."""

    inter: list[float]
    intra: float
    a: float
    b: float
    cci: float
    ext: list[float]  # one for each token of the chunk


def inter_mass(weights, chunk: Span, earlier: Span) -> float:
    """Attention that a chunk's tokens give those of an earlier one, in one layer."""
    return sum(float(weights[t][s]) for t in chunk for s in earlier)


def intra_mass(weights, chunk: Span) -> float:
    """Attention that a chunk's tokens give each other and themselves, in one layer."""
    return sum(float(weights[t][s]) for t in chunk for s in chunk if s <= t)


def statistics(attention: Attention, chunk: Span, earlier: Sequence[Span]) -> Statistics:
    """The statistics of one chunk after `earlier` ones; rows in no span, such as a system prompt's, do not count.

    CCI is taken of the ratio of the two means over layers, a and b, not of the mean of ratios.
    """
    layers = len(attention)
    inter = [sum(inter_mass(weights, chunk, other) for weights in attention) / layers for other in earlier]
    a = b = intra = 0.0
    for weights in attention:
        for other in earlier:
            a += inter_mass(weights, chunk, other) / (len(chunk) * len(other)) / layers
        intra += intra_mass(weights, chunk) / layers
        b += intra_mass(weights, chunk) / len(chunk) ** 2 / layers
    ext = [
        sum(float(weights[t][s]) for weights in attention for other in earlier for s in other) / layers for t in chunk
    ]
    return Statistics(inter, intra, a, b, 1 / (1 + float(np.exp(-a / b))), ext)


# ---- how well a variant fits a new context ----


@dataclass(frozen=True)
class Variant:
    """One cached form of a chunk. `context` are the chunks that came before it, `inter` its I_j for each of them."""

    context: tuple
    inter: tuple[float, ...]
    cci: float
    ext: tuple[float, ...]
    start: int = 0  # position of its first token
    digest: object = None  # of model, tokenizer and system prompt
    exact_source: bool = True  # computed in full, every chunk before it in full too or exact
    score: float = 0.0
    created: int = 0
    name: object = 0


@dataclass(frozen=True)
class Fit:
    beta: float
    gamma: float
    adjusted: float  # beta'
    cfo: float
    count: int  # N
    tokens: list[int]  # places in the chunk of the N tokens to compute again, ascending
    exact: bool


def distinct(context: Sequence) -> list:
    if len(set(context)) != len(context):
        raise ValueError(f"a context names each chunk once, got {list(context)}")
    return list(context)


def overlap(old: Sequence, inter: Sequence[float], new: Sequence) -> float:
    """beta: how much of the attention given to the old context goes to chunks that the new one has too.

    A variant that gave none fits an empty context wholly and any other not at all.
    """
    old, new = distinct(old), distinct(new)
    total = sum(inter)
    if total == 0:
        return 1.0 if not new else 0.0
    return sum(mass for chunk, mass in zip(old, inter, strict=True) if chunk in new) / total


def disorder(old: Sequence, new: Sequence) -> float:
    """gamma: the share of pairs of common chunks that stand the other way round."""
    old, new = distinct(old), distinct(new)
    shared = [chunk for chunk in old if chunk in new]
    pairs = turned = 0
    for i, first in enumerate(shared):
        for second in shared[i + 1 :]:
            pairs += 1
            turned += new.index(first) > new.index(second)
    return turned / pairs if pairs else 0.0


def recompute(ext: Sequence[float], cfo: float) -> list[int]:
    """The places of the ceil(CFO x tokens) tokens that looked outside most, ascending; of equals, the earlier."""
    count = int(np.ceil(cfo * len(ext) - 1e-9))
    return sorted(common.best(dict(enumerate(ext)), count))


def fit(variant: Variant, new: Sequence, *, start: int = 0, digest: object = None, alpha: float = 1.0) -> Fit:
    """How a variant fits after the chunks `new`, at position `start`. A CFO of 0 is not exactness; `exact` is."""
    beta = overlap(variant.context, variant.inter, new)
    gamma = disorder(variant.context, new)
    adjusted = beta * (1 - gamma)
    cfo = min(1.0, max(0.0, alpha * variant.cci * (1 - adjusted)))
    tokens = recompute(variant.ext, cfo)
    same = list(variant.context) == list(new) and (variant.start, variant.digest) == (start, digest)
    return Fit(beta, gamma, adjusted, cfo, len(tokens), tokens, same and variant.exact_source)


def choose(
    variants: Sequence[Variant], new: Sequence, *, start: int = 0, digest: object = None, alpha: float = 1.0
) -> tuple[Variant, Fit] | None:
    """The variant of lowest CFO; of equals an exact one, then the most used, the newest, the smallest name.

    None, a miss, where there is no variant or the best would be computed again in full.
    """
    pairs = [(variant, fit(variant, new, start=start, digest=digest, alpha=alpha)) for variant in variants]
    pairs.sort(key=lambda pair: (pair[1].cfo, not pair[1].exact, -pair[0].score, -pair[0].created, pair[0].name))
    return pairs[0] if pairs and pairs[0][1].cfo < 1 else None


# ---- which variants stay ----


@dataclass
class Shelf:
    """Use scores of the stored variants. `capacity` and `per_chunk` count variants; a key is (chunk, variant)."""

    capacity: int
    per_chunk: int = 5
    floor: float = 0.01
    decay: float = 0.5
    every: int = 10_000
    scores: dict[tuple, float] = field(default_factory=dict)
    last: dict[tuple, int] = field(default_factory=dict)
    uses: int = 0

    def use(self, key: tuple, cfo: float = 1.0) -> tuple | None:
        """Counts one use, storing the variant if it is new, and returns what had to go for it.

        A use with the default CFO is that of a variant stored after a miss. The lowest score goes, of equals the least
        recently used: of the same chunk if that has as many as it may, else of all. All scores decay after every so
        many uses.
        """
        gone = None
        if key not in self.scores:
            kin = [other for other in self.scores if other[0] == key[0]]
            rivals = kin if len(kin) >= self.per_chunk else list(self.scores)
            if len(kin) >= self.per_chunk or len(self.scores) >= self.capacity:
                gone = min(rivals, key=lambda other: (self.scores[other], self.last[other]))
                del self.scores[gone], self.last[gone]
        self.scores[key] = self.scores.get(key, 0.0) + 1 / max(cfo, self.floor)
        self.last[key] = self.uses
        self.uses += 1
        if self.uses % self.every == 0:
            self.scores = {other: self.decay * score for other, score in self.scores.items()}
        return gone


# ---- rotation ----


def rotate(x: np.ndarray, position: float, base: float = 10000.0, layout: str = "half") -> np.ndarray:
    """Rotates one vector. "half" pairs coordinate i with i + D/2, "interleaved" 2i with 2i + 1.

    A key that was rotated to p comes to p' by a rotation of p' - p.
    """
    x = np.asarray(x, np.float64)
    if layout == "half":
        return common.rope(x, position, base)
    if layout != "interleaved":
        raise ValueError(f"no such layout: {layout}")
    rotated = np.zeros(len(x))
    for i in range(0, len(x), 2):
        angle = position * base ** (-i / len(x))
        c, s = np.cos(angle), np.sin(angle)
        rotated[i], rotated[i + 1] = x[i] * c - x[i + 1] * s, x[i] * s + x[i + 1] * c
    return rotated


# ---- the model ----


@dataclass(frozen=True)
class Model:
    """A Llama-like model: RMS norms before attention and MLP, half-split rotation, tied unembedding.

    weights: "embedding" f64[V, E]; "norm" f64[E], or absent for none before the unembedding; "layers", a list of dicts:
      wq [Hq D, E], wk and wv [H D, E], wo [E, Hq D], attention_norm and mlp_norm [E], w_up [F, E], w_down [E, F], and
      w_gate [F, E] for SwiGLU; a layer without w_gate has w_down relu(w_up x).
    """

    weights: Mapping
    q_heads: int
    kv_heads: int
    head_dim: int
    epsilon: float = 1e-6
    base: float = 10000.0


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a request, with what is stored of them: f64[L, c, H, D], keys not rotated; None nothing."""

    tokens: tuple[int, ...]
    keys: np.ndarray | None = None
    values: np.ndarray | None = None


@dataclass(frozen=True)
class Layer:
    """What one layer of a prefill computed: `new` keys and values per active row, attention f64[Hq, N] per row.

    `stored` holds the keys and values of every row that had any before the layer.
    """

    number: int
    new: dict[int, tuple[np.ndarray, np.ndarray]]
    stored: dict[int, tuple[np.ndarray, np.ndarray]]
    probs: dict[int, np.ndarray]


@dataclass(frozen=True)
class Prefill:
    """state: f64[E], the last token's, before the last norm. logits: f64[V], the last token's.

    keys, values: f64[L, N, H, D], keys not rotated. probs: per layer, f64[Hq, N] of each active row.
    """

    state: np.ndarray
    logits: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    probs: list[dict[int, np.ndarray]]


Thin = Callable[[Layer], Sequence[int]]  # the rows that go on after this layer


def spans(parts: Sequence[Part]) -> list[Span]:
    """The rows of each part."""
    starts = np.cumsum([0] + [len(part.tokens) for part in parts])
    return [range(int(a), int(b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]


def cut(result: Prefill, tokens: Sequence[int], span: Span) -> Part:
    """The rows of one chunk out of a prefill, to be stored."""
    rows = slice(span.start, span.stop)
    return Part(tuple(tokens), result.keys[:, rows].copy(), result.values[:, rows].copy())


def over_heads(result: Prefill) -> list[dict[int, np.ndarray]]:
    """Attention of every layer as the statistics want it: f64[N] of each active row."""
    return [{row: probs.mean(axis=0) for row, probs in layer.items()} for layer in result.probs]


def rms_norm(x: np.ndarray, gain: np.ndarray | None, epsilon: float) -> np.ndarray:
    x = x / np.sqrt(np.mean(x * x) + epsilon)
    return x if gain is None else x * np.asarray(gain, np.float64)


def perceptron(x: np.ndarray, layer: Mapping) -> np.ndarray:
    up = np.asarray(layer["w_up"], np.float64) @ x
    if "w_gate" in layer:
        gate = np.asarray(layer["w_gate"], np.float64) @ x
        up = gate / (1 + np.exp(-gate)) * up
    else:
        up = np.maximum(up, 0)
    return np.asarray(layer["w_down"], np.float64) @ up


def prefill(
    model: Model,
    parts: Sequence[Part],
    active: Sequence[int] | None = None,
    *,
    thin: Thin | None = None,
    last_seen: Callable[[int, list[int]], int] = lambda row, rows: row,
) -> Prefill:
    """Computes the active rows over stored keys and values; None computes all rows, a full prefill.

    An active row's new key and value take the place of the stored ones, which are not read. Other rows have no hidden
    state. `thin` may take rows away after a layer; the layers above use what is stored of them.

    `last_seen(row, rows)` is the last key that a row sees, of all active `rows`: itself, unless a fault is to be shown.
    """
    tokens = [token for part in parts for token in part.tokens]
    n, heads, dim = len(tokens), model.kv_heads, model.head_dim
    group = model.q_heads // heads
    rows = list(range(n)) if active is None else sorted(set(active))
    if not rows or rows[-1] != n - 1 or rows[0] < 0:
        raise ValueError(f"active rows must lie in 0..{n - 1} and include the last, got {rows}")
    layers = model.weights["layers"]
    h = {row: np.asarray(model.weights["embedding"][tokens[row]], np.float64) for row in rows}
    all_keys = np.zeros((len(layers), n, heads, dim))
    all_values = np.zeros((len(layers), n, heads, dim))
    all_probs = []

    for number, layer in enumerate(layers):
        weights = {name: np.asarray(weight, np.float64) for name, weight in layer.items()}
        stored = {
            row: (np.asarray(part.keys[number][i], np.float64), np.asarray(part.values[number][i], np.float64))
            for part, span in zip(parts, spans(parts), strict=True)
            if part.keys is not None
            for i, row in enumerate(span)
        }
        queries, new = {}, {}
        for row in rows:
            x = rms_norm(h[row], weights["attention_norm"], model.epsilon)
            queries[row] = (weights["wq"] @ x).reshape(model.q_heads, dim)
            new[row] = ((weights["wk"] @ x).reshape(heads, dim), (weights["wv"] @ x).reshape(heads, dim))
        held = {**stored, **new}
        missing = [row for row in range(n) if row not in held]
        if missing:
            raise ValueError(f"rows {missing} are neither active nor stored")
        for row, (key, value) in held.items():
            all_keys[number, row], all_values[number, row] = key, value
        turned = {row: [rotate(key[x], row, model.base) for x in range(heads)] for row, (key, _) in held.items()}

        probs = {}
        for row in rows:
            probs[row] = np.zeros((model.q_heads, n))
            outs = []
            for x in range(model.q_heads):
                query = rotate(queries[row][x], row, model.base)
                sees = range(last_seen(row, rows) + 1)
                given = common.softmax({s: float(query @ turned[s][x // group]) / dim**0.5 for s in sees})
                outs.append(sum(p * held[s][1][x // group] for s, p in given.items()))
                for s, p in given.items():
                    probs[row][x, s] = p
            h[row] = h[row] + weights["wo"] @ np.concatenate(outs)
            h[row] = h[row] + perceptron(rms_norm(h[row], weights["mlp_norm"], model.epsilon), weights)
        all_probs.append(probs)

        if thin is not None:
            going_on = sorted(set(thin(Layer(number, new, stored, probs))))
            if not set(going_on) <= set(rows) or n - 1 not in going_on:
                raise ValueError(f"rows that go on must be active and include the last, got {going_on}")
            rows = going_on

    state = h[n - 1]
    last = state if "norm" not in model.weights else rms_norm(state, model.weights["norm"], model.epsilon)
    logits = np.asarray(model.weights["embedding"], np.float64) @ last
    return Prefill(state, logits, all_keys, all_values, all_probs)


def active_rows(parts: Sequence[Part], again: Mapping[int, Sequence[int]]) -> list[int]:
    """All rows of parts without anything stored, and of part i the places `again[i]`, as rows."""
    rows = []
    for i, (part, span) in enumerate(zip(parts, spans(parts), strict=True)):
        rows.extend(span if part.keys is None else [span[place] for place in again.get(i, ())])
    return sorted(rows)


# ---- stopping where the question does not look ----


def question_mass(weights, question: Span, chunks: Sequence[Span]) -> list[float]:
    """s_l: attention of the question's rows to each chunk per token of it, in one layer."""
    return [inter_mass(weights, question, chunk) / len(chunk) for chunk in chunks]


def focused(totals: Sequence[float]) -> set[int]:
    """The chunks before the widest gap of the descending sums S_l; of equal sums the earlier chunk stands first.

    Of equal gaps the first; a single chunk is always focused.
    """
    order = sorted(range(len(totals)), key=lambda i: (-totals[i], i))
    gaps = [totals[a] - totals[b] for a, b in zip(order[:-1], order[1:], strict=True)]
    return set(order[: gaps.index(max(gaps)) + 1]) if gaps else set(order)


def stop_layer(sets: Sequence[set[int]], first: int = 10, repeats: int = 3) -> int | None:
    """The layer after whose check the choice stands: `repeats` equal sets in a row, none from below layer `first`."""
    for last in range(first + repeats - 1, len(sets)):
        if all(sets[i] == sets[last] for i in range(last - repeats + 1, last)):
            return last
    return None


def focus_stop(
    parts: Sequence[Part], chunks: Sequence[int], question: int, *, first: int = 10, repeats: int = 3
) -> Thin:
    """Takes the stored chunks that are not focused out of the computation, once the choice stands.

    `chunks` and `question` say which parts those are; rows of parts without anything stored stay.
    """
    places = spans(parts)
    totals = [0.0] * len(chunks)
    sets: list[set[int]] = []

    def thin(layer: Layer) -> list[int]:
        weights = {row: probs.mean(axis=0) for row, probs in layer.probs.items()}
        mass = question_mass(weights, places[question], [places[i] for i in chunks])
        for i, more in enumerate(mass):
            totals[i] += more
        sets.append(focused(totals))
        rows = sorted(layer.new)
        if stop_layer(sets, first, repeats) == layer.number:
            out = [i for x, i in enumerate(chunks) if x not in sets[-1] and parts[i].keys is not None]
            rows = [row for row in rows if not any(row in places[i] for i in out)]
        return rows

    return thin


# ---- CacheBlend's choice of tokens ----


def deviation(
    new: Mapping[int, tuple], stored: Mapping[int, tuple], *, keys: bool = False, values: bool = True
) -> dict[int, float]:
    """Squared distance of a row's new from its stored values, keys or both, over all heads; rows with both only."""
    found = {}
    for row in new:
        if row in stored:
            pairs = zip(new[row], stored[row], (keys, values), strict=True)
            found[row] = sum(float(((a - b) ** 2).sum()) for a, b, counts in pairs if counts)
    return found


def blend_rows(deviations: Mapping[int, float], ratio: float, n: int, suffix: int) -> list[int]:
    """The floor(ratio x (n - suffix)) rows that moved most, of equals the earlier, and the last `suffix` rows."""
    count = int(np.floor(ratio * (n - suffix)))
    before = {row: d for row, d in deviations.items() if row < n - suffix}
    return sorted(common.best(before, count)) + list(range(n - suffix, n))


def blend_once(n: int, suffix: int, ratio: float = 0.15, *, check: int = 1) -> Thin:
    """The code's way: every row through layer `check`, then those whose values moved most there.

    Given to `prefill` with all rows active; new keys and values of the other rows stay in the layers up to `check`.
    """

    def thin(layer: Layer) -> list[int]:
        if layer.number != check:
            return sorted(layer.new)
        return blend_rows(deviation(layer.new, layer.stored), ratio, n, suffix)

    return thin


def blend_gradually(n: int, suffix: int, ratios: Sequence[float | None]) -> Thin:
    """The paper's way: after each layer fewer of the rows that are left, by keys and values; None keeps all of them.

    `ratios` has one share of all rows but the suffix for each layer, and must not rise. In layer 0 stored rows do not
    differ at all, so a share there would take the earliest; give None.
    """

    def thin(layer: Layer) -> list[int]:
        ratio = ratios[layer.number]
        if ratio is None:
            return sorted(layer.new)
        return blend_rows(deviation(layer.new, layer.stored, keys=True), ratio, n, suffix)

    return thin


# ---- loading by layers ----


def layers_first(layers: int, compute: int, load: int) -> int:
    """L_p: how many layers must be loaded before the first is computed, so that none waits. Times are whole ticks."""
    return max(1, -((layers - 1) * (compute - load) // load) + 1)


def load_and_compute(layers: int, compute: int, load: int, first: int) -> tuple[int, int]:
    """Ticks at which the last layer is done and ticks spent waiting, computing once `first` layers are loaded.

    One layer is loaded at a time and one computed at a time, from tick to tick.
    """
    if min(layers, compute, load, first) < 1 or first > layers:
        raise ValueError(
            f"counts and times must be at least 1 and first at most {layers}, got {compute=}, {load=}, {first=}"
        )
    now = done = spent = waited = 0
    begun = False
    while done < layers:
        loaded = now // load
        begun = begun or loaded >= first
        if begun and loaded > done:
            spent += 1
            if spent == compute:
                done, spent = done + 1, 0
        else:
            waited += begun
        now += 1
    return now, waited


# ---- one attention in two parts, as decoding over a shared prefix takes it ----


def attend_part(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    """Output f64[D] of one query over some of its keys, and the log of the sum of their weights.

    Keys and query are rotated already. No keys give zeros and minus infinity.
    """
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    if not len(keys):
        return np.zeros(len(query)), -np.inf
    logits = {i: float(query @ key) / len(query) ** 0.5 for i, key in enumerate(keys)}
    top = max(logits.values())
    lse = top + float(np.log(sum(np.exp(x - top) for x in logits.values())))
    return sum(p * values[i] for i, p in common.softmax(logits).items()), lse


def join(parts: Sequence[tuple[np.ndarray, float]]) -> tuple[np.ndarray, float]:
    """The attention over all keys from those over parts of them; of empty parts alone, zeros and minus infinity."""
    top = max(lse for _, lse in parts)
    if top == -np.inf:
        return np.zeros(len(parts[0][0])), -np.inf
    weights = [float(np.exp(lse - top)) for _, lse in parts]
    total = sum(weights)
    return sum(w * out for w, (out, _) in zip(weights, parts, strict=True)) / total, top + float(np.log(total))
