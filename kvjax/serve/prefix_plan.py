"""Which prompts of an offline batch share a prefix: one level of groups, found before anything is read.

Source: BatchLLM, Zheng et al. 2024, arXiv:2412.03594; "exact" and the alignment inside it are ours. Host code: no JAX.

The last token of a prompt is never shared, so every request has a token of its own to get logits from. Prefixes are
whole pages; what is left of one leads the suffixes.
"""

import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvjax.counts import whole

Prompts = Sequence[Sequence[int]] | Sequence[np.ndarray]


class Group(NamedTuple):
    """Prompts that are read behind one prefix; a prompt by itself is a group of one with prefix_length 0."""

    prefix_length: int  # tokens, a multiple of the page
    members: tuple[int, ...]  # indices of prompts, ascending


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every prompt in exactly one group.

    `logical_tokens` are those of all prompts, `physical_tokens` those to be read: each prefix once, and the suffixes.
    """

    groups: tuple[Group, ...]
    method: str
    page: int
    logical_tokens: int
    physical_tokens: int

    @property
    def saving(self) -> float:
        """Tokens that need not be read, in percent of all."""
        return 100 * (1 - self.physical_tokens / self.logical_tokens)

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, in hexadecimal: processes that must act alike compare it."""
        sha = hashlib.sha256(
            f"{self.method} {self.page} {self.logical_tokens} {self.physical_tokens}\n".encode("ascii")
        )
        numbers = [x for length, members in self.groups for x in (length, len(members), *members)]
        sha.update(np.array(numbers, "<i8").tobytes())
        return sha.hexdigest()


def plan(prompts: Prompts, *, method: str = "exact", page: int = 1) -> Plan:
    """Groups prompts by common prefixes so that few tokens are read.

    Args:
      prompts: Token ids of each prompt, not padded.
      method: "exact" saves the most that one level of groups can. "paper" lifts nodes of the prefix tree as long as
        each by itself gains; it misses what gains only jointly, in a few percent of random trees. "naive" groups by
        the first branch of the tree, and fails where all prompts begin with the same instruction.
      page: Prefixes are multiples of so many tokens. "exact" is optimal for these; the others are cut afterwards.

    Returns:
      Groups with a prefix in the method's order, then the prompts that share none, by index. See `ordered`.

    Raises:
      ValueError: If there is no prompt, if one is empty or no sequence of token ids, if the method is unknown, or if
        page is below 1.
    """
    if method not in _METHODS:
        raise ValueError(f"plan: method={method!r} is unknown. Take one of {', '.join(_METHODS)}.")
    page = whole("plan", "page", page, least=1, mend="Prefixes are multiples of it; 1 cuts nothing.")
    rows = _rows("plan", prompts)
    saved, shared, alone = 0, [], []
    cut = [(depth // page * page, members) for depth, members in _METHODS[method](_tree(rows), page)]
    for length, members in cut:
        if length and len(members) > 1:
            shared.append(Group(length, tuple(sorted(members))))
            saved += length * (len(members) - 1)
        else:
            alone.extend(members)
    logical = sum(row.size for row in rows)
    return Plan((*shared, *(Group(0, (i,)) for i in sorted(alone))), method, page, logical, logical - saved)


def bound(prompts: Prompts) -> int:
    """Tokens that prefixes on any number of levels would save, without pages: no plan saves more.

    Raises:
      ValueError: As `plan` does for prompts.
    """
    tree = _tree(_rows("bound", prompts))
    leaves = _leaves(tree)
    return sum((leaves[v] - 1) * (tree.depth[v] - tree.depth[tree.parent[v]]) for v in tree.order[1:])


def ordered(plan: Plan, lengths: Sequence[int], outputs: Sequence[int]) -> Plan:
    """The plan with groups first that decode much for what they read, so that long prefills meet many decodes.

    Args:
      plan: A plan.
      lengths: Tokens of each prompt.
      outputs: Tokens to be generated for each prompt, at most. If all are the same, groups are ordered as the paper
        does, fewest tokens to be read first; else by tokens to be generated over tokens to be read, most first. Ties
        go to the group with the smallest index of a prompt.

    Raises:
      ValueError: If lengths or outputs are not one for each prompt, or too small.
    """
    lengths = _lengths("ordered", plan, lengths)
    outputs = [whole("ordered", f"outputs[{i}]", count, least=1) for i, count in enumerate(outputs)]
    if len(outputs) != len(lengths):
        raise ValueError(f"ordered: there are {len(outputs)} outputs for {len(lengths)} prompts. Give one for each.")
    alike = min(outputs) == max(outputs)

    def rank(group: Group) -> tuple[float, int]:
        generated = 1 if alike else sum(outputs[i] for i in group.members)
        return -generated / _physical(group, lengths), group.members[0]

    return dataclasses.replace(plan, groups=tuple(sorted(plan.groups, key=rank)))


def partition(plan: Plan, lengths: Sequence[int], parts: int) -> tuple[tuple[Group, ...], ...]:
    """Gives groups to hosts or data shards so that each reads about as much.

    The largest group goes to the part with least, and so on; ties go to the group with the smallest index of a prompt,
    and to the first part. A group is split only if it is larger than 1.25 of the mean part: into as few pieces
    as are within that, or else one for each part. Each piece reads the prefix anew.

    Args:
      plan: A plan.
      lengths: Tokens of each prompt.
      parts: How many there are.

    Returns:
      The groups of each part, in the plan's order; a part without groups is empty.

    Raises:
      ValueError: If lengths are not one for each prompt or too small, or if parts is below 1.
    """
    parts = whole("partition", "parts", parts, least=1, mend="Give the number of hosts or data shards.")
    lengths = _lengths("partition", plan, lengths)
    most = 1.25 * sum(_physical(group, lengths) for group in plan.groups) / parts
    pieces = [piece for group in plan.groups for piece in _split(group, lengths, parts, most)]
    sizes = [_physical(piece, lengths) for piece in pieces]
    load, owner = [0] * parts, [0] * len(pieces)
    for at in sorted(range(len(pieces)), key=lambda at: (-sizes[at], pieces[at].members[0])):
        owner[at] = load.index(min(load))
        load[owner[at]] += sizes[at]
    return tuple(tuple(piece for piece, to in zip(pieces, owner, strict=True) if to == part) for part in range(parts))


def _split(group: Group, lengths: list[int], parts: int, most: float) -> list[Group]:
    pieces = [group]
    while len(pieces) < min(parts, len(group.members)) and max(_physical(one, lengths) for one in pieces) > most:
        runs = np.array_split(np.array(group.members), len(pieces) + 1)
        pieces = [Group(group.prefix_length if run.size > 1 else 0, tuple(run.tolist())) for run in runs]
    return pieces


def _physical(group: Group, lengths: list[int]) -> int:
    """Tokens that a group reads."""
    return sum(lengths[i] for i in group.members) - group.prefix_length * (len(group.members) - 1)


def _lengths(where: str, plan: Plan, lengths: Sequence[int]) -> list[int]:
    count = sum(len(group.members) for group in plan.groups)
    if len(lengths) != count:
        raise ValueError(
            f"{where}: there are {len(lengths)} lengths, and the plan has {count} prompts. Give one for each."
        )
    lengths = [whole(where, f"lengths[{i}]", length, least=1) for i, length in enumerate(lengths)]
    for group in plan.groups:
        for i in group.members:
            if lengths[i] <= group.prefix_length:
                raise ValueError(
                    f"{where}: lengths[{i}]={lengths[i]}, and its group has a prefix of {group.prefix_length}. "
                    f"Give the lengths of the prompts that were planned: each has a token of its own."
                )
    return lengths


def _rows(where: str, prompts: Prompts) -> list[np.ndarray]:
    """Each prompt as i32[T]."""
    if len(prompts) == 0:
        raise ValueError(f"{where}: there are no prompts. Give at least one.")
    rows = [_row(where, i, prompt) for i, prompt in enumerate(prompts)]
    for i, row in enumerate(rows):
        if row.size == 0:
            raise ValueError(f"{where}: prompts[{i}] is empty. Give every prompt at least one token.")
        if row.min() < 0:
            raise ValueError(f"{where}: prompts[{i}] holds {row.min()}, and token ids are not negative. Is it padded?")
    return rows


def _row(where: str, i: int, prompt) -> np.ndarray:
    mend = "Give token ids, a flat sequence for each prompt: see model.encode."
    if hasattr(prompt, "dtype"):
        row = np.asarray(prompt)
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"{where}: prompts[{i}] is {row.dtype}{list(row.shape)}, and must be integers [T]. {mend}")
        if row.dtype != np.int32 and row.size and not -(2**31) <= row.min() <= row.max() < 2**31:
            raise ValueError(f"{where}: prompts[{i}] holds what is no token id of 32 bits. {mend}")
        return row.astype(np.int32, copy=False)
    try:  # faster than numpy, and refuses floats; of bytes it would take four for a token
        return np.frombuffer(array("i", list(prompt) if isinstance(prompt, bytes) else prompt), np.int32)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: prompts[{i}] is no sequence of integers of 32 bits. {mend}") from None


class _Tree(NamedTuple):
    """The compact prefix tree of prompts without their last tokens. Node 0 is the root."""

    depth: list[int]  # tokens from the root to the end of a node
    parent: list[int]
    children: list[list[int]]  # in the order of their smallest prompts, which is that of insertion
    ids: list[list[int]]  # prompts that end at a node, ascending
    order: list[int]  # all nodes, each before its children


def _tree(rows: list[np.ndarray]) -> _Tree:
    # Prompts with a common prefix are neighbours once sorted, whatever the order of tokens: bytes sort fastest.
    rows = [row[:-1] for row in rows]
    keys = [row.tobytes() for row in rows]
    depth, parent, ids = [0], [-1], [[]]

    def add(at: int, under: int) -> int:
        depth.append(at)
        parent.append(under)
        ids.append([])
        return len(depth) - 1

    path, before = [0], rows[0][:0]  # nodes from the root to the end of the prompt before
    for i in sorted(range(len(rows)), key=keys.__getitem__):
        row = rows[i]
        common, last = _common(before, row), 0
        while depth[path[-1]] > common:
            last = path.pop()
        if depth[path[-1]] < common:  # the edge to `last` is cut in two
            parent[last] = add(common, path[-1])
            path.append(parent[last])
        if row.size > common:
            path.append(add(row.size, path[-1]))
        ids[path[-1]].append(i)
        before = row

    children = [[] for _ in depth]
    for v in range(1, len(depth)):
        children[parent[v]].append(v)
    order = _preorder(children)
    first = [own[0] if own else len(rows) for own in ids]
    for v in reversed(order[1:]):
        first[parent[v]] = min(first[parent[v]], first[v])
    for below in children:
        below.sort(key=first.__getitem__)
    return _Tree(depth, parent, children, ids, _preorder(children))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens with which both begin."""
    count = min(a.size, b.size)
    differ = a[:count] != b[:count]
    at = int(differ.argmax()) if count else 0
    return at if count and differ[at] else count


def _preorder(children: list) -> list[int]:
    order, stack = [], [0]
    while stack:
        order.append(stack.pop())
        stack.extend(reversed(children[order[-1]]))
    return order


def _leaves(tree: _Tree) -> list[int]:
    """Prompts at or below each node."""
    leaves = [len(own) for own in tree.ids]
    for v in reversed(tree.order[1:]):
        leaves[tree.parent[v]] += leaves[v]
    return leaves


def _branches(depth: list[int], children: list, ids: list[list[int]]) -> list[tuple[int, list[int]]]:
    """A group for each child of the root, and the prompts that end at the root."""
    found = [(0, [i]) for i in ids[0]]
    for child in children[0]:
        members, stack = [], [child]
        while stack:
            v = stack.pop()
            members.extend(ids[v])
            stack.extend(children[v])
        found.append((depth[child], members))
    return found


def _naive(tree: _Tree, page: int) -> list[tuple[int, list[int]]]:
    return _branches(tree.depth, tree.children, tree.ids)


def _paper(tree: _Tree, page: int) -> list[tuple[int, list[int]]]:
    """Algorithm 1: after its own subtree, each node gives children to its parent that gain more than they lose."""
    depth, ids, leaves = list(tree.depth), list(tree.ids), _leaves(tree)
    children = [dict.fromkeys(below) for below in tree.children]  # ordered, and any can leave
    for v in _postorder(tree.children):
        above = tree.parent[v]
        for child in list(children[v]):
            if (leaves[child] - 1) * (depth[child] - depth[v]) > depth[v] - depth[above]:
                del children[v][child]
                children[above][child] = None
                leaves[v] -= leaves[child]
                if len(children[v]) == 1 and not ids[v]:  # the only child left costs nothing more
                    (only,) = children[v]
                    depth[v], children[v], ids[v] = depth[only], children[only], ids[only]
                    break
        if not children[v] and not ids[v]:
            del children[above][v]
    return _branches(depth, children, ids)


def _postorder(children: list) -> list[int]:
    """All nodes but the root, each behind its children."""
    order, stack = [], [0]
    while stack:
        order.append(stack.pop())
        stack.extend(children[order[-1]])
    return order[:0:-1]


def _exact(tree: _Tree, page: int) -> list[tuple[int, list[int]]]:
    """Opens nodes as prefixes, which prompts below share with the nearest: dynamic programming, bottom up.

    Saved is the depth of each prompt's nearest open node, less that of the open nodes. For each node, a vector over the
    ancestors that may be the nearest open one above it, the root standing for none.
    """
    aligned = [depth // page * page for depth in tree.depth]
    level = [0] * len(aligned)
    for v in tree.order[1:]:
        level[v] = level[tree.parent[v]] + 1
    path = np.zeros(max(level) + 1, np.int64)  # aligned depths from the root to the node at hand
    prompts = [len(own) for own in tree.ids]  # at a node, or ...
    below = [None] * len(aligned)  # i64[level + 1]: the best of all children, for each nearest open ancestor
    opens = [0] * len(aligned)  # a node opens below its first so many ancestors: what it adds falls with their depth
    stack = [0]
    while stack:
        v = stack.pop()
        if v >= 0:
            path[level[v]] = aligned[v]
            stack.append(~v)
            stack.extend(tree.children[v])
            continue
        v = ~v
        if v == 0:
            break
        up = tree.parent[v]
        if not tree.children[v] and prompts[v] == 1:
            prompts[up] += 1  # ... alone on a branch: it never opens, and takes what its parent has
            continue
        closed = prompts[v] * path[: level[v]]
        opened = (prompts[v] - 1) * aligned[v]
        if below[v] is not None:
            closed += below[v][:-1]
            opened += int(below[v][-1])
            below[v] = None
        opens[v] = int(np.count_nonzero(closed < opened))  # a tie stays closed
        best = np.maximum(closed, opened)
        below[up] = best if below[up] is None else below[up] + best

    found, stack = [(0, [])], [(0, 0, 0)]  # node, level of the nearest open ancestor, its group
    while stack:
        v, nearest, group = stack.pop()
        if nearest < opens[v]:
            nearest, group = level[v], len(found)
            found.append((tree.depth[v], []))
        found[group][1].extend(tree.ids[v])
        stack.extend((child, nearest, group) for child in reversed(tree.children[v]))
    return [*found[1:], *((0, [i]) for i in found[0][1])]


_METHODS: dict[str, Callable] = {"naive": _naive, "paper": _paper, "exact": _exact}
