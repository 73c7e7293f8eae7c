"""Reuse of caches: shared prefixes in offline batches, passages of retrieval, and which cached pages stay."""
