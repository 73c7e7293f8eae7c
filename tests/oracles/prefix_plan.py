"""Plans of shared prefixes: the best over all set partitions, and the paper's greedy one on a tree of token lists.

Source: BatchLLM, Zheng et al. 2024, arXiv:2412.03594, Algorithm 1. Prompts go in without their last token.
"""

import os


def set_partitions(items: list):
    """All ways to put `items` into blocks."""
    if not items:
        yield []
        return
    for blocks in set_partitions(items[1:]):
        yield [[items[0]], *blocks]
        for at, block in enumerate(blocks):
            yield [*blocks[:at], [items[0], *block], *blocks[at + 1 :]]


def saved_by(blocks: list[list[int]], prompts: list[list[int]], page: int) -> int:
    """Tokens saved if each block shares what all its prompts begin with, whole pages of it."""
    saved = 0
    for block in blocks:
        common = os.path.commonprefix([prompts[i][:-1] for i in block])
        saved += len(common) // page * page * (len(block) - 1)
    return saved


def best(prompts: list[list[int]], page: int = 1) -> int:
    """Tokens saved by the best partition."""
    return max(saved_by(blocks, prompts, page) for blocks in set_partitions(list(range(len(prompts)))))


def on_all_levels(prompts: list[list[int]]) -> int:
    """Tokens saved if every token is read once for all prompts that agree up to it."""
    beginnings = [tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt))]
    return len(beginnings) - len(set(beginnings))


class Node:
    """A node of the compact tree, with the tokens on the edge that leads to it."""

    def __init__(self, tokens: list[int]):
        self.tokens = tokens
        self.children: list[Node] = []
        self.ids: list[int] = []

    def below(self) -> list[int]:
        """Prompts at or below this node."""
        return self.ids + [i for child in self.children for i in child.below()]


def tree(prompts: list[list[int]]) -> Node:
    """Inserts prompts one by one."""
    root = Node([])
    for i, prompt in enumerate(prompts):
        node, rest = root, prompt[:-1]
        while rest:
            child = next((c for c in node.children if c.tokens[0] == rest[0]), None)
            if child is None:
                child = Node(rest)
                node.children.append(child)
            common = len(os.path.commonprefix([child.tokens, rest]))
            if common < len(child.tokens):
                lower = Node(child.tokens[common:])
                lower.children, lower.ids = child.children, child.ids
                child.tokens, child.children, child.ids = child.tokens[:common], [lower], []
            node, rest = child, rest[common:]
        node.ids.append(i)
    return root


def maximize_reuse(node: Node) -> None:
    """Lifts grandchildren that gain more than they lose, bottom up."""
    for child in list(node.children):
        maximize_reuse(child)
        for grandchild in list(child.children):
            gain = (len(grandchild.below()) - 1) * len(grandchild.tokens) - len(child.tokens)
            if gain > 0:
                child.children.remove(grandchild)
                grandchild.tokens = child.tokens + grandchild.tokens
                node.children.append(grandchild)
                if len(child.children) == 1 and not child.ids:
                    only = child.children[0]
                    child.tokens, child.children, child.ids = child.tokens + only.tokens, only.children, only.ids
                    break
        if not child.children and not child.ids:
            node.children.remove(child)


def first_branches(prompts: list[list[int]], *, lift: bool, page: int = 1) -> list[tuple[int, tuple[int, ...]]]:
    """Groups (prefix length, prompts) of the naive plan, or with `lift` of the paper's, then the prompts alone."""
    root = tree(prompts)
    if lift:
        maximize_reuse(root)
    groups = [(len(child.tokens) // page * page, tuple(sorted(child.below()))) for child in root.children]
    shared = [(length, members) for length, members in groups if length and len(members) > 1]
    grouped = {i for _, members in shared for i in members}
    return shared + [(0, (i,)) for i in range(len(prompts)) if i not in grouped]
