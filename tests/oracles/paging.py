"""Paging with succinct predictions, and its rivals, as steps over plain states: exact expectations, no draws.

Source: Antoniadis et al. 2022, arXiv:2210.02775, by way of the project's specification. A policy is a step:
(state, page, prediction, k) -> list of (probability, state, fault). States are tuples, so that equal ones add up;
the deterministic policies have lists of one. `k` is the capacity, pages have size 1, predictions are bits or times.
"""

from fractions import Fraction

ONE = Fraction(1)


def expected(step, trace, predictions, k):
    """Expected faults, as a Fraction, and the least and the most that any outcome has."""
    states = {((), 0): ONE}
    for page, prediction in zip(trace, predictions, strict=True):
        after = {}
        for (state, faults), share in states.items():
            for probability, new, fault in step(state, page, prediction, k):
                key = (new, faults + fault)
                after[key] = after.get(key, 0) + share * probability
        states = after
    counts = {}
    for (_, faults), share in states.items():
        counts[faults] = counts.get(faults, 0) + share
    assert sum(counts.values()) == 1
    return sum(faults * share for faults, share in counts.items()), min(counts), max(counts)


def pattern(step, trace, predictions, k):
    """The faults of a deterministic policy, a list of 0 and 1."""
    state, found = (), []
    for page, prediction in zip(trace, predictions, strict=True):
        [(probability, state, fault)] = step(state, page, prediction, k)
        assert probability == 1
        found.append(fault)
    return found


# ---- in hindsight ----


def next_time(trace, i):
    """Time of the next request of the page of request i; beyond all times if there is none."""
    later = [j for j in range(i + 1, len(trace)) if trace[j] == trace[i]]
    return later[0] if later else float("inf")


def lfd(trace, k):
    """Faults of Belady's choice, a list of 0 and 1, and the true discard bits."""
    inside, found, bits = set(), [], [0] * len(trace)
    for i, page in enumerate(trace):
        found.append(int(page not in inside))
        if page not in inside and len(inside) == k:
            latest = {p: max(j for j in range(i) if trace[j] == p) for p in inside}
            worst = min(inside, key=lambda p: (-next_time(trace, latest[p]), p))
            bits[latest[worst]] = 1
            inside.remove(worst)
        inside.add(page)
    return found, bits


def least_faults(trace, k, inside=frozenset()):
    """The fewest faults that any choice of victims has, by trying all of them."""
    if not trace:
        return 0
    page, rest = trace[0], trace[1:]
    if page in inside:
        return least_faults(rest, k, inside)
    if len(inside) < k:
        return 1 + least_faults(rest, k, inside | {page})
    return 1 + min(least_faults(rest, k, inside - {out} | {page}) for out in inside)


def phase_truth(trace, k):
    """Phase of each request; phase bits; which requests are the last of their page in their phase."""
    phase, current = [], []
    for page in trace:
        if page not in current and len(set(current)) == k:
            current = []
            phase.append(phase[-1] + 1)
        else:
            phase.append(phase[-1] if phase else 0)
        current.append(page)
    bits, last = [], []
    for i, page in enumerate(trace):
        following = [trace[j] for j in range(len(trace)) if phase[j] == phase[i] + 1]
        bits.append(int(page not in following))
        last.append(not any(trace[j] == page and phase[j] == phase[i] for j in range(i + 1, len(trace))))
    return phase, bits, last


def wrong(bits, truth, counted=None):
    """How many bits are wrongly 0, and wrongly 1."""
    counted = counted or [True] * len(bits)
    zeros = sum(b == 0 and d == 1 for b, d, c in zip(bits, truth, counted, strict=True) if c)
    ones = sum(b == 1 and d == 0 for b, d, c in zip(bits, truth, counted, strict=True) if c)
    return zeros, ones


# ---- deterministic; a state is the pages with their bits, least recently requested first ----


def lru(state, page, prediction, k):
    inside = [p for p, _ in state]
    fault = page not in inside
    rest = [p for p in inside if p != page]
    if fault and len(rest) == k:
        rest = rest[1:]
    return [(ONE, tuple((p, None) for p in [*rest, page]), int(fault))]


def fifo(state, page, prediction, k):
    if page in state:
        return [(ONE, state, 0)]
    return [(ONE, (*(state[1:] if len(state) == k else state), page), 1)]


def flush_when_full(state, page, prediction, k):
    if page in state:
        return [(ONE, state, 0)]
    return [(ONE, tuple(sorted({*(() if len(state) == k else state), page})), 1)]


def _flush_when_zero(lazy):
    def step(state, page, bit, k):
        pages = list(state)
        fault = page not in [p for p, _ in pages]
        if fault and len(pages) == k:
            if all(b == 0 for _, b in pages):
                pages = [(p, 1) for p, _ in pages] if lazy else []
            ones = [p for p, b in pages if b == 1]
            pages = [entry for entry in pages if not ones or entry[0] != ones[0]]
        return [(ONE, (*(entry for entry in pages if entry[0] != page), (page, bit)), int(fault))]

    return step


flush_when_zero, flush_when_zero_lazy = _flush_when_zero(False), _flush_when_zero(True)


def blind_oracle(state, page, time, k):
    inside = dict(state)
    fault = page not in inside
    if fault and len(inside) == k:
        del inside[min(inside, key=lambda p: (-inside[p], p))]
    inside[page] = time
    return [(ONE, tuple(sorted(inside.items())), int(fault))]


# ---- randomised; a state is the pages with what is known of them, in any fixed order ----


def _all_of(victims, then):
    """The outcomes of a uniform draw."""
    return [(Fraction(1, len(victims)), then(victim), 1) for victim in sorted(victims)]


def _frozen(inside):
    return tuple(sorted(inside.items()))


def _marking(take_ones_first):
    def step(state, page, bit, k):
        inside = dict(state)  # page -> (marked, bit)
        if page in inside or len(inside) < k:
            fault = page not in inside
            inside[page] = (True, bit)
            return [(ONE, _frozen(inside), int(fault))]
        if all(marked for marked, _ in inside.values()):
            inside = {p: (False, b) for p, (_, b) in inside.items()}
        unmarked = [p for p, (marked, _) in inside.items() if not marked]
        ones = [p for p in unmarked if inside[p][1] == 1]
        victims = ones if take_ones_first and ones else unmarked
        return _all_of(
            victims, lambda out: _frozen({p: x for p, x in inside.items() if p != out} | {page: (True, bit)})
        )

    return step


marker, mark_and_predict = _marking(False), _marking(True)


def mark_zero(state, page, bit, k):
    """Pages of bit 1 leave at once."""
    inside = dict(state)  # page -> marked

    def arrived(inside):
        return _frozen({p: m for p, m in inside.items() if p != page} | ({page: True} if bit == 0 else {}))

    if page in inside or len(inside) < k:
        return [(ONE, arrived(inside), int(page not in inside))]
    if all(inside.values()):
        inside = dict.fromkeys(inside, False)
    unmarked = [p for p, marked in inside.items() if not marked]
    return _all_of(unmarked, lambda out: arrived({p: m for p, m in inside.items() if p != out}))


def mark_zero_lazy(state, page, bit, k):
    """A state is the pages of bit 1, least recently requested first, and the others with their marks."""
    ones, zeros = (list(state[0]), dict(state[1])) if state else ([], {})

    def arrived(ones, zeros):
        ones, zeros = [p for p in ones if p != page], {p: m for p, m in zeros.items() if p != page}
        return (tuple(ones + [page] * bit), _frozen(zeros | ({} if bit else {page: True})))

    inside = page in ones or page in zeros
    if inside or len(ones) + len(zeros) < k:
        return [(ONE, arrived(ones, zeros), int(not inside))]
    if ones:
        return [(ONE, arrived(ones[1:], zeros), 1)]
    if all(zeros.values()):
        zeros = dict.fromkeys(zeros, False)
    unmarked = [p for p, marked in zeros.items() if not marked]
    return _all_of(unmarked, lambda out: arrived([], {p: m for p, m in zeros.items() if p != out}))


def _marking_with_times(limit_of):
    """PredictiveMarker, whose chains are at most H_k long; LMarker believes for clean pages alone."""

    def step(state, page, time, k):
        inside, start, chain = (dict(state[0]), set(state[1]), dict(state[2])) if state else ({}, set(), {})

        def after(out, length):
            left = {p: x for p, x in inside.items() if p != out} | {page: (True, time)}
            chains = chain if out is None else chain | {out: length}
            return (_frozen(left), tuple(sorted(start)), _frozen(chains))

        if page in inside or len(inside) < k:
            return [(ONE, after(None, 0), int(page not in inside))]
        if all(marked for marked, _ in inside.values()):
            inside = {p: (False, t) for p, (_, t) in inside.items()}
            start, chain = set(inside), {}
        unmarked = [p for p, (marked, _) in inside.items() if not marked]
        farthest = min(unmarked, key=lambda p: (-inside[p][1], p))
        if page not in start:
            return [(ONE, after(farthest, 1), 1)]
        length = chain[page] + 1
        if length <= limit_of(k):
            return [(ONE, after(farthest, length), 1)]
        return _all_of(unmarked, lambda out: after(out, length))

    return step


predictive_marker = _marking_with_times(lambda k: sum(Fraction(1, i) for i in range(1, k + 1)))
lmarker = _marking_with_times(lambda k: 0)


def guard(state, page, time, k):
    inside, old, evicted, guarded = (dict(state[0]), *map(set, state[1:])) if state else ({}, set(), set(), set())

    def after(out, guards):
        left = {p: t for p, t in inside.items() if p != out} | {page: time}
        sets = old - {page, out}, evicted | ({out} - {None}), guarded | ({page} if guards else set())
        return (_frozen(left), *(tuple(sorted(one)) for one in sets))

    if page in inside or len(inside) < k:
        return [(ONE, after(None, False), int(page not in inside))]
    if not old:
        old, evicted, guarded = set(inside), set(), set()
    if page in evicted:
        return _all_of(old, lambda out: after(out, True))
    free = [p for p in inside if p not in guarded]
    return [(ONE, after(min(free, key=lambda p: (-inside[p], p)), False), 1)]


# ---- combinations of deterministic policies ----


def combination(steps, pick):
    """Faults 0 and 1 of a cache that follows shadows: `pick(faults, charged)` names the one that is followed."""

    def run(trace, predictions, k):
        states, inside = [()] * len(steps), []  # least recently requested first
        faults, charged, found = [0] * len(steps), [0] * len(steps), []
        for page, prediction in zip(trace, predictions, strict=True):
            for i, step in enumerate(steps):
                [(_, states[i], fault)] = step(states[i], page, prediction, k)
                faults[i] += fault
            found.append(int(page not in inside))
            if page not in inside and len(inside) == k:
                i = pick(faults, charged)
                charged[i] += 1
                held = [entry[0] if isinstance(entry, tuple) else entry for entry in states[i]]
                inside.remove(next(p for p in inside if p not in held))
            inside = [p for p in inside if p != page] + [page]
        return found, charged

    return run


def by_weight(weights):
    return lambda faults, charged: min(
        range(len(weights)), key=lambda i: (Fraction(charged[i] + 1) / Fraction(str(weights[i])), i)
    )


def leader():
    current = [0]

    def pick(faults, charged):
        other = 1 - current[0]
        if faults[current[0]] > faults[other]:
            current[0] = other
        return current[0]

    return pick
