"""Sizes that shapes are rounded up to, so that few programs are compiled."""


def bucket(count: int, *, steps: int = 2, least: int = 16) -> int:
    """The next size, of `steps` between a power of two and the next one: 64, 96, 128, 192 of two. 0 stays 0."""
    count = int(count)
    if count <= least:
        return least if count else 0
    step = max(1, (1 << (count - 1).bit_length() - 1) // steps)
    return -(-count // step) * step
