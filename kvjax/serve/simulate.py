"""What policies of `kvjax.serve.paging` cost on a trace, and how the cost grows as predictions go wrong.

`faults` runs a policy on the host. `simulate` runs those that have a state of fixed size under jit, many rows of
predictions and seeds at once, and finds the same faults bit by bit.
"""

import csv
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.counts import real, whole
from kvjax.draws import mix
from kvjax.serve import paging, traces
from kvjax.tables import COLOURS, MARKERS

FREE = -1  # no page
LATEST = jnp.iinfo(jnp.int32).max


def faults(pages: paging.Pages, trace: Any, predictions: Any = None) -> np.ndarray:
    """Requests of `trace` whose page is missing, bool[T]. `pages` is new, and used up.

    Args:
      pages: A policy.
      trace: Pages, i32[T].
      predictions: One a request, as the policy wants them; None for none.

    Raises:
      ValueError: If there are more or fewer predictions than requests, or one makes no sense.
    """
    trace = traces.check(trace).tolist()
    predictions = [None] * len(trace) if predictions is None else np.asarray(predictions).tolist()
    _check_length("faults", predictions, trace)
    missing = np.zeros(len(trace), bool)
    for i, (page, prediction) in enumerate(zip(trace, predictions, strict=True)):
        missing[i] = page not in pages
        pages.request(page, prediction=prediction)
    return missing


# ---- under jit ----


class Slots(NamedTuple):
    """The cache: `page` i32[k], FREE where there is none, and of each page the bit, mark, time of its latest request
    (of coming in, for FIFO) and next request; i32, the mark is bool."""

    page: jax.Array
    bit: jax.Array
    mark: jax.Array
    last: jax.Array
    next: jax.Array


Leave = Callable[[Slots, Callable], tuple[Slots, jax.Array]]  # slots and draw -> slots in a new phase, leaving bool[k]


def _least(value: jax.Array, candidate: jax.Array) -> jax.Array:
    """The candidate with the least value, as a mask bool[k] of one slot, or none."""
    at = jnp.where(candidate, value, LATEST).argmin()
    return (jnp.arange(len(value)) == at) & candidate


def _everyone(slots: Slots) -> jax.Array:
    return slots.page != FREE


def _oldest(slots: Slots, draw) -> tuple[Slots, jax.Array]:
    return slots, _least(slots.last, _everyone(slots))


def _farthest(slots: Slots, draw) -> tuple[Slots, jax.Array]:
    last_of_all = slots.next == slots.next.max()  # it is only asked when there is no free slot
    return slots, _least(slots.page, last_of_all)


def _all(slots: Slots, draw) -> tuple[Slots, jax.Array]:
    return slots, _everyone(slots)


def _ones_or_all(slots: Slots, draw) -> tuple[Slots, jax.Array]:
    ones = slots.bit == 1
    return slots, jnp.where(ones.any(), _least(slots.last, ones), _everyone(slots))


def _ones_or_oldest(slots: Slots, draw) -> tuple[Slots, jax.Array]:
    slots = slots._replace(bit=jnp.where((slots.bit == 1).any(), slots.bit, 1))
    return slots, _least(slots.last, slots.bit == 1)


def _unmarked(slots: Slots, draw) -> tuple[Slots, jax.Array]:
    slots = slots._replace(mark=slots.mark & ~slots.mark.all())
    return slots, draw(~slots.mark)


def _unmarked_ones(slots: Slots, draw) -> tuple[Slots, jax.Array]:
    slots = slots._replace(mark=slots.mark & ~slots.mark.all())
    ones = ~slots.mark & (slots.bit == 1)
    return slots, draw(jnp.where(ones.any(), ones, ~slots.mark))


def _ones_or_unmarked(slots: Slots, draw) -> tuple[Slots, jax.Array]:
    ones = slots.bit == 1
    phase_ends = slots.mark.all()  # not while there is a page of bit 1: those have no mark
    slots = slots._replace(mark=slots.mark & ~phase_ends)
    return slots, jnp.where(ones.any(), _least(slots.last, ones), draw(~slots.mark))


class Jitted(NamedTuple):
    """A policy for `simulate`: who leaves, and how it departs from the common step."""

    leave: Leave
    refreshes: bool = True  # a hit makes a page the latest
    marks_ones: bool = True  # pages of bit 1 too
    discards: bool = False  # a page of bit 1 leaves at once


JITTED = {
    "belady": Jitted(_farthest),
    "lru": Jitted(_oldest),
    "fifo": Jitted(_oldest, refreshes=False),
    "flush_when_full": Jitted(_all),
    "marker": Jitted(_unmarked),
    "flush_when_zero": Jitted(_ones_or_oldest),
    "flush_when_zero, real flush": Jitted(_ones_or_all),
    "mark_zero": Jitted(_ones_or_unmarked, marks_ones=False),
    "mark_zero, at once": Jitted(_unmarked, marks_ones=False, discards=True),
    "mark_and_predict": Jitted(_unmarked_ones),
}


def simulate(policy: str, trace: Any, capacity: int, *, bits: Any = None, seeds: Any = 0) -> np.ndarray:
    """Requests of `trace` whose page is missing, for many rows of bits and seeds at once.

    A random choice is that of the smallest hash of seed, number of the eviction and page, as with `replay` on the host.

    Args:
      policy: One of `JITTED`: what is in `paging`, with "flush_when_zero, real flush" and "mark_zero, at once" for
        those that are not lazy.
      trace: Pages, i32[T], for all rows, or i32[R, T].
      capacity: Pages that fit in.
      bits: u8[T] or u8[R, T]; None for none, which counts as 1.
      seeds: u32[] or u32[R].

    Returns:
      bool[T], or bool[R, T] if anything came in rows.

    Raises:
      ValueError: If bits are no bits or their number is not that of the requests, or there is no such policy.
    """
    if policy not in JITTED:
        raise ValueError(f"simulate: there is no policy {policy!r}; there are {', '.join(map(repr, JITTED))}.")
    capacity = whole("simulate", "capacity", capacity, least=1)
    rows = np.atleast_2d(trace)
    rows = traces.check(rows.ravel()).reshape(rows.shape)
    bits = np.ones(rows.shape, np.uint8) if bits is None else np.asarray(bits)
    seeds = np.asarray(seeds)
    _check_length("simulate", np.atleast_2d(bits)[0], rows[0])
    if not np.isin(bits, (0, 1)).all():
        raise ValueError("simulate: bits must be 0 or 1; there are others.")
    if seeds.dtype.kind not in "iu" or (seeds < 0).any() or (seeds >= 2**32).any():
        raise ValueError(f"simulate: seeds={seeds} must be whole numbers in 0..{2**32 - 1}.")
    following = np.stack([traces.next_requests(row) for row in rows]) if policy == "belady" else np.zeros_like(rows)
    requests = np.stack(np.broadcast_arrays(rows, np.atleast_2d(bits), following))  # [3, R, T]
    count = max(requests.shape[1], seeds.size)
    length = requests.shape[2]
    bucket = min(1024, 1 << (length - 1).bit_length())  # so that few lengths are compiled
    padded = np.zeros((3, count, -(-length // bucket) * bucket), np.int32)
    padded[0] = FREE
    padded[:, :, :length] = requests
    found = _simulate(JITTED[policy], capacity, padded, np.broadcast_to(seeds.astype(np.uint32), (count,)))
    found = np.asarray(found)[:, :length]
    return found if np.ndim(trace) == 2 or np.ndim(bits) == 2 or seeds.ndim else found[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _simulate(policy: Jitted, capacity: int, requests: jax.Array, seeds: jax.Array) -> jax.Array:
    """Faults bool[R, T] of requests i32[3, R, T]: page, bit and next request. Of a page FREE there is nothing to do."""

    def step(state, request):
        slots, evictions, now = state
        page, bit, following, seed = request

        def draw(candidate):
            stream = mix(seed ^ mix(evictions))
            value = jnp.where(candidate, mix(stream ^ mix(slots.page.astype(jnp.uint32))), jnp.uint32(0xFFFFFFFF))
            return _least(slots.page, candidate & (value == value.min()))

        here = slots.page == page
        missing = (page != FREE) & ~here.any()
        full = missing & (slots.page != FREE).all()
        after, leaving = policy.leave(slots, draw)
        slots = jax.tree.map(lambda new, old: jnp.where(full, new, old), after, slots)
        leaving = leaving & full
        slots = slots._replace(page=jnp.where(leaving, FREE, slots.page))
        free = slots.page == FREE
        at = (jnp.arange(capacity) == jnp.where(missing, free.argmax(), here.argmax())) & (page != FREE)
        slots = Slots(
            page=jnp.where(at, page, slots.page),
            bit=jnp.where(at, bit, slots.bit),
            mark=jnp.where(at, policy.marks_ones | (bit == 0), slots.mark & (slots.page != FREE)),
            last=jnp.where(at & (missing | policy.refreshes), now, slots.last),
            next=jnp.where(at, following, slots.next),
        )
        if policy.discards:
            slots = slots._replace(page=jnp.where(at & (bit == 1), FREE, slots.page))
        gone = leaving.sum() + (policy.discards & (page != FREE) & (bit == 1))
        return (slots, evictions + gone.astype(jnp.uint32), now + 1), missing

    def row(requests, seed):
        none = jnp.zeros(capacity, jnp.int32)
        slots = Slots(none + FREE, none, none != 0, none, none)
        seeds = jnp.broadcast_to(seed, requests.shape[1])
        return jax.lax.scan(step, (slots, jnp.uint32(0), jnp.int32(0)), (*requests, seeds))[1]

    return jax.vmap(row, in_axes=(1, 0))(requests, seeds)


# ---- cost against error ----


class Cost(NamedTuple):
    """Faults of a policy, of those of the best choice in hindsight.

    Attributes:
      policy: Its name.
      error: What is wrong with its predictions: "none" of it predicts, bits that "flip", or times that are "late".
      noise: Probability of a flip, or sigma of `traces.late`; 0 for policies that take no prediction.
      ratio: Mean over seeds, and the least and the most of them.
    """

    policy: str
    error: str
    noise: float
    ratio: float
    least: float
    most: float


FLIPS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
SIGMAS = (0.0, 2.0, 5.0, 10.0, 20.0, 50.0, 200.0)


def sweep(
    trace: Any,
    capacity: int,
    *,
    flips: Sequence[float] = FLIPS,
    sigmas: Sequence[float] = SIGMAS,
    seeds: int = 3,
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Cost]:
    """Costs of all policies on `trace`, as predictions get worse.

    Discard bits flip for all that take bits, but for `mark_and_predict`: its phase bits do.

    Args:
      trace: Pages, i32[T].
      capacity: Pages that fit in.
      flips: Probabilities that a bit is wrong.
      sigmas: Of the lognormal times by which next requests are predicted too late.
      seeds: Draws of errors and of random choices.
      advance: Called with (what is being done, steps done, steps in all).
    """
    trace, seeds = traces.check(trace), range(whole("sweep", "seeds", seeds, least=1))
    flips = [real("sweep", "flips", flip, least=0, most=1) for flip in flips]
    sigmas = [real("sweep", "sigmas", sigma, least=0) for sigma in sigmas]
    following = traces.next_requests(trace)
    alone, bitwise = ("lru", "fifo", "marker"), ("flush_when_zero", "mark_zero", "mark_and_predict")
    combined = {
        "combine, 0.8 + 0.2": lambda seed: paging.combine(
            [paging.mark_zero(capacity, seed=seed), paging.lru(capacity)], (0.8, 0.2)
        ),
        "follow_the_leader": lambda seed: paging.follow_the_leader(
            [paging.mark_zero(capacity, seed=seed), paging.lru(capacity)]
        ),
    }
    timewise = {
        "blind_oracle": lambda seed: paging.blind_oracle(capacity),
        "predictive_marker": lambda seed: paging.predictive_marker(capacity, seed=seed),
        "lmarker": lambda seed: paging.lmarker(capacity, seed=seed),
        "guard": lambda seed: paging.guard(capacity, seed=seed),
    }
    steps = 1 + len(alone) + len(bitwise) + len(combined) * len(flips) + len(timewise) * len(sigmas)
    done = iter(range(1, steps + 1))
    best = int(simulate("belady", trace, capacity).sum())
    advance("belady", next(done), steps)
    costs = []

    def note(policy, error, noise, counts):
        ratios = np.asarray(counts) / best
        costs.append(Cost(policy, error, noise, *(float(f(ratios)) for f in (np.mean, np.min, np.max))))

    for name in alone:
        note(name, "none", 0.0, simulate(name, trace, capacity, seeds=np.arange(len(seeds))).sum(axis=-1))
        advance(name, next(done), steps)
    wrong = {
        truth: np.stack([[traces.flip(truth(trace, capacity), flip, seed=seed) for seed in seeds] for flip in flips])
        for truth in (traces.discard_bits, traces.phase_bits)
    }  # u8[flips, seeds, T]
    for name in bitwise:
        bits = wrong[traces.phase_bits if name == "mark_and_predict" else traces.discard_bits]
        rows = bits.reshape(-1, len(trace))
        found = simulate(name, trace, capacity, bits=rows, seeds=np.tile(np.arange(len(seeds)), len(flips)))
        for flip, counts in zip(flips, found.sum(axis=-1).reshape(len(flips), -1), strict=True):
            note(name, "flip", flip, counts)
        advance(name, next(done), steps)
    for name, make in combined.items():
        for flip, bits in zip(flips, wrong[traces.discard_bits], strict=True):
            note(name, "flip", flip, [faults(make(seed), trace, bits[seed]).sum() for seed in seeds])
            advance(name, next(done), steps)
    for name, make in timewise.items():
        for sigma in sigmas:
            times = [traces.late(following, sigma, seed=seed) for seed in seeds]
            note(name, "late", sigma, [faults(make(seed), trace, times[seed]).sum() for seed in seeds])
            advance(name, next(done), steps)
    return costs


def table(costs: Sequence[Cost]) -> list[list[str]]:
    """A line for each policy and a column for each amount of noise of each kind; the first line names them."""
    columns = list(dict.fromkeys((cost.error, cost.noise) for cost in costs if cost.error != "none"))
    names = {"flip": "flip {:g}", "late": "late {:g}"}
    lines = [["policy", *(names[error].format(noise) for error, noise in columns)]]
    for policy in dict.fromkeys(cost.policy for cost in costs):
        own = {(cost.error, cost.noise): f"{cost.ratio:.3f}" for cost in costs if cost.policy == policy}
        lines.append([policy, *(own.get(column, own.get(("none", 0.0), "")) for column in columns)])
    return lines


def comma_separated(costs: Sequence[Cost]) -> str:
    """The costs with all their digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Cost._fields)
    writer.writerows(costs)
    return out.getvalue()


def picture(costs: Sequence[Cost], title: str) -> bytes:
    """Cost against error, a line for each policy, as PNG: flipped bits on the left, late times on the right.

    Raises:
      ModuleNotFoundError: If matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained", sharey=True)
    for panel, error in zip(panels, ("flip", "late"), strict=True):
        amounts = list(dict.fromkeys(cost.noise for cost in costs if cost.error == error))
        for look, policy in enumerate(dict.fromkeys(cost.policy for cost in costs if cost.error == error)):
            line = [cost for cost in costs if cost.policy == policy and cost.error == error]
            at, colour = range(len(line)), COLOURS[look % len(COLOURS)]
            panel.plot(at, [cost.ratio for cost in line], marker=MARKERS[look % len(MARKERS)], color=colour,
                       label=policy, linewidth=1.8, markersize=6)  # fmt: skip
            least, most = [cost.least for cost in line], [cost.most for cost in line]
            panel.fill_between(at, least, most, color=colour, alpha=0.15)
        for cost, style in zip((cost for cost in costs if cost.error == "none"), ("--", ":", "-."), strict=False):
            panel.axhline(cost.ratio, color="black", linewidth=1, linestyle=style, label=cost.policy)
        panel.set_xticks(range(len(amounts)), [f"{amount:g}" for amount in amounts])
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(loc="best", framealpha=0.9, edgecolor="none", fontsize=8)
    panels[0].set_xlabel("probability that a bit is wrong")
    panels[1].set_xlabel("next requests predicted late: sigma of the lognormal delay")
    panels[0].set_ylabel("faults, of those of Belady's choice")
    figure.suptitle(title, fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    plt.close(figure)
    return out.getvalue()


def _check_length(where: str, predictions: Sequence, trace: Sequence) -> None:
    if len(predictions) != len(trace):
        raise ValueError(
            f"{where}: {len(predictions)} predictions for {len(trace)} requests. Give one a request, in the same order."
        )
