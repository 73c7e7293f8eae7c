"""Reuse of caches: shared prefixes in offline batches, passages of retrieval, and which cached pages stay."""

from kvjax.serve import jobs, paging
from kvjax.serve.batch_llm import Finished, Progress, answers, batch
from kvjax.serve.chunk_cache import Choice, ChunkCache, Prefilled, Used, by_context, by_deviation, nothing
from kvjax.serve.chunk_store import Store, namespace_of
from kvjax.serve.fit import Focus
from kvjax.serve.page_pool import Lease, PagePool
from kvjax.serve.prefix_plan import Group, Plan, bound, ordered, partition, plan

__all__ = [
    "Choice",
    "ChunkCache",
    "Finished",
    "Focus",
    "Group",
    "Lease",
    "PagePool",
    "Plan",
    "Prefilled",
    "Progress",
    "Store",
    "Used",
    "answers",
    "batch",
    "bound",
    "by_context",
    "by_deviation",
    "jobs",
    "namespace_of",
    "nothing",
    "ordered",
    "paging",
    "partition",
    "plan",
]
