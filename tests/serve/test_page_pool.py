"""The pool of pages between device and host: what comes back, what is held once, who leaves, and what is refused."""

import dataclasses
import hashlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import policies
from kvjax.cache import FREE, Cache, LayerShape, resize
from kvjax.serve import page_pool, paging
from kvjax.serve.page_pool import PagePool, page_keys
from tests.tiny import CONFIG, random_params, random_tokens

PARAMS, FULL, PAGE = random_params(), policies.full(), 4
PAGE_BYTES = 2 * CONFIG.layers * CONFIG.kv_heads * PAGE * CONFIG.head_dim * 4
TALK = np.asarray(random_tokens(1, 18, seed=1))[0]
MORE = np.asarray(random_tokens(1, 5, seed=2))[0]


def make(device=8, **settings):
    return PagePool(PARAMS, **{"device_pages": device, "page": PAGE, **settings})


@jax.jit
def _made(tokens, length):
    """Keys and values that tell every prefix from every other, exactly; no model is run."""
    seen = jnp.cumsum((tokens + 1) * (jnp.arange(len(tokens)) + 7) ** 2 % 4096)
    layers = []
    for i in range(CONFIG.layers):
        empty = FULL.empty(LayerShape(1, CONFIG.kv_heads, len(tokens), CONFIG.head_dim, jnp.float32, i))
        places = jax.lax.broadcasted_iota(jnp.int32, empty.k.shape, 3) + 10 * i
        heads = 1 + jax.lax.broadcasted_iota(jnp.int32, empty.k.shape, 1)
        k = (seen[:, None] * heads + places).astype(jnp.float32)
        at = jax.lax.broadcasted_iota(jnp.int32, empty.pos.shape, 2)
        layers.append(dataclasses.replace(empty, k=k, v=-k, pos=jnp.where(at < length, at, FREE)))
    return tuple(layers)


def cache_of(tokens, slots=32):
    padded = np.zeros(slots, np.int32)
    padded[: len(tokens)] = tokens
    return Cache(_made(padded, len(tokens)), jnp.asarray([len(tokens)], jnp.int32), FULL, CONFIG)


def put(pool, tokens, **settings):
    return pool.put(PARAMS, tokens, cache_of(tokens), **settings)


def found(pool, tokens):
    """How many of `tokens`, all of them in a conversation that goes on, come back; compared, and let go."""
    lease = pool.get(PARAMS, [*tokens, 0])
    assert_holds(lease, [*tokens, 0])
    pool.release(lease)
    return lease.length


def assert_holds(lease, tokens):
    if lease.cache is None:
        assert lease.length == 0
        return
    assert_array_equal(lease.cache.length, [lease.length])
    for got, wanted in zip(lease.cache.layers, cache_of(tokens).layers, strict=True):
        assert_array_equal(np.sort(got.pos)[..., -lease.length :], wanted.pos[..., : lease.length])
        for mine, own in ((got.k, wanted.k), (got.v, wanted.v)):
            assert_array_equal(mine[:, :, : lease.length], own[:, :, : lease.length])


def pages(pool, side="device"):
    return pool.stats()["pages"][side]


# ---- what comes back ----


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_conversation_goes_on_with_the_same_answers(evicted, dtype):
    params = random_params(dtype=dtype)
    pool = PagePool(params, device_pages=5, page=PAGE)
    _, cache = kvjax.prefill(params, FULL, TALK[None])
    pool.put(params, TALK, cache)
    if evicted:
        other = np.asarray(random_tokens(1, 20, seed=3))[0]
        pool.put(params, other, kvjax.prefill(params, FULL, other[None])[1])
        assert pages(pool, "host") == 5
    lease = pool.get(params, [*TALK, *MORE])
    assert lease.length == len(TALK)
    assert pool.stats()["hits"] == ({"device": 0, "host": 5} if evicted else {"device": 5, "host": 0})
    wide = dataclasses.replace(cache, layers=tuple(resize(layer, 24) for layer in cache.layers))  # or sums differ
    assert jax.tree.structure(lease.cache) == jax.tree.structure(wide)
    wanted, _ = kvjax.prefill(params, FULL, MORE[None], cache=wide)
    logits, _ = kvjax.prefill(params, FULL, MORE[None], cache=lease.cache)
    assert_allclose(logits, wanted, rtol=0, atol=1e-6)
    says = [kvjax.decode(params, FULL, MORE[None], cache=one, max_new_tokens=5) for one in (wide, lease.cache)]
    assert_array_equal(says[0].tokens, says[1].tokens)


def test_the_cache_of_a_lease_may_be_donated_and_the_pool_keeps_its_own():
    pool = make()
    put(pool, TALK)
    lease = pool.get(PARAMS, [*TALK, 5])
    step = jax.jit(kvjax.step, donate_argnames="cache")
    logits, cache = step(PARAMS, FULL, jnp.asarray([5]), lease.cache)
    assert lease.cache.layers[0].k.is_deleted() and bool(jnp.isfinite(logits).all())
    pool.release(lease)
    assert pool.put(PARAMS, [*TALK, 5], cache) == 1
    assert found(pool, TALK) == 18


def test_a_decoded_conversation_is_put_turn_by_turn_and_read_from_where_it_ended():
    pool, seen = make(), np.asarray([], np.int32)
    for turn, fresh in enumerate((TALK[:7], MORE[:3])):
        lease = pool.get(PARAMS, [*seen, *fresh])
        assert lease.length == len(seen)
        out = kvjax.decode(PARAMS, FULL, fresh[None], cache=lease.cache, max_new_tokens=3)
        pool.release(lease)
        seen = np.concatenate([seen, fresh, np.asarray(out.tokens)[0]])
        pool.put(PARAMS, seen, out.cache)
        assert pages(pool) == -(-len(seen) // PAGE), turn  # the partial page of the first turn has made way
    wanted, _ = kvjax.prefill(PARAMS, FULL, np.asarray([*seen, 5])[None])
    lease = pool.get(PARAMS, [*seen, 5])
    logits, _ = kvjax.prefill(PARAMS, FULL, np.asarray([[5]]), cache=lease.cache)
    assert_allclose(logits, wanted, atol=2e-5)  # the prompt in one piece, or in five


def test_slots_may_be_in_any_order_and_some_of_them_free():
    pool, cache = make(), cache_of(TALK[:10])
    order = jnp.asarray(np.random.default_rng(0).permutation(32))
    moved = [
        dataclasses.replace(x, k=x.k[:, :, order], v=x.v[:, :, order], pos=x.pos[..., order]) for x in cache.layers
    ]
    pool.put(PARAMS, TALK[:10], dataclasses.replace(cache, layers=tuple(moved)))
    assert found(pool, TALK[:10]) == 10


def test_the_last_token_is_always_left_to_be_read():
    pool = make()
    put(pool, TALK[:8])
    assert [pool.get(PARAMS, TALK[:n]).length for n in (8, 9, 12, 1)] == [7, 8, 8, 0]
    assert pool.get(PARAMS, [60, 60]).cache is None


def test_a_part_of_a_page_is_found_too():
    pool = make()
    put(pool, TALK[:11])
    assert found(pool, [*TALK[:6], 60, 60]) == 6
    assert found(pool, [*TALK[:10]]) == 10
    assert put(pool, TALK[:10]) == 0  # a longer page has it already
    assert put(pool, TALK[:11]) == 0


# ---- keys ----


def test_keys_are_a_chain_of_digests():
    seed = hashlib.sha256(b"kvjax/1|toy").digest()

    def said(tokens):
        return [key.hex()[:16] for key in page_keys(seed, tokens, 4)[:2]]

    assert seed.hex()[:16] == "d666954857c7d573"
    assert said(range(1, 11)) == ["d7af664b255c21fd", "bff6f9705fe7b4b7"]
    assert said([1, 2, 3, 4, 5, 60, 7, 8]) == ["d7af664b255c21fd", "dfd2e750391c8583"]
    assert said([0, 2, 3, 4, 5, 6, 7, 8]) == ["1a4e9733322188a3", "efb6dcb97585548b"]
    assert len(page_keys(seed, range(1, 11), 4)) == 3  # beyond the specification's vector: a part of a page has a key


# ---- bytes, and programs ----


def test_conversations_that_begin_alike_hold_their_pages_once():
    pool = make(host_pages=20)
    assert put(pool, TALK[:16]) == 4
    assert put(pool, [*TALK[:12], *MORE[:4]]) == 1
    assert pages(pool) == 5
    put(pool, MORE.tolist() * 5)  # 7 pages
    assert pages(pool, "host") == 4 and pool.stats()["bytes"]["host"] == 4 * PAGE_BYTES
    assert (found(pool, TALK[:16]), found(pool, [*TALK[:12], *MORE[:4]])) == (16, 16)


def test_the_devices_buffers_never_grow_and_are_written_in_place():
    pool = make()
    for i in range(5):
        places = [x.unsafe_buffer_pointer() for layer in pool._buffers for x in layer]
        put(pool, np.roll(TALK, i))
        assert [x.unsafe_buffer_pointer() for layer in pool._buffers for x in layer] == places
        assert pool.stats()["bytes"]["device"] == kvjax.nbytes(pool._buffers) == 8 * PAGE_BYTES


def test_a_second_conversation_of_the_same_bucket_compiles_nothing():
    programs = page_pool._cut, page_pool._written, page_pool._stacked, page_pool._gathered
    pool, counts = make(5), []
    for tokens in (TALK, TALK[::-1], TALK[1:], TALK[1:][::-1]):  # 18 tokens and 17, both 5 pages: a bucket of 6
        put(pool, tokens)
        counts.append([program._cache_size() for program in programs])
        assert found(pool, tokens) == len(tokens)
    found(pool, TALK)
    first = counts[2]  # by then pages have left once
    assert pool.stats()["moved"]["to_device"] > 0
    assert [program._cache_size() for program in programs] == counts[3] == first


def test_what_is_brought_back_and_what_leaves_moves_in_one_transfer_each_and_only_once():
    pool = make(4, host_pages=8)
    put(pool, TALK[:16])
    put(pool, TALK[::-1][:16])
    assert pool.stats()["moved"] == {"to_host": 4 * PAGE_BYTES, "to_device": 0}
    found(pool, TALK[:16])
    assert pool.stats()["moved"] == {"to_host": 8 * PAGE_BYTES, "to_device": 4 * PAGE_BYTES}
    found(pool, TALK[::-1][:16])  # a copy of what leaves now is still on the host
    assert pool.stats()["moved"] == {"to_host": 8 * PAGE_BYTES, "to_device": 8 * PAGE_BYTES}
    assert pool.stats()["evicted"] == {"device": 12, "host": 0}


# ---- who leaves ----


def test_tails_leave_first_so_that_what_is_here_is_of_use():
    pool = make(4, host_pages=0)
    put(pool, TALK[:12])
    put(pool, MORE.tolist() * 2)  # 3 pages
    assert found(pool, TALK[:12]) == 4
    assert pool.stats()["dropped"] == 2


def test_leased_pages_stay_until_the_last_lease_is_released():
    pool = make(4, host_pages=0)
    put(pool, TALK[:12])
    one, two = (pool.get(PARAMS, [*TALK[:12], 1]) for _ in range(2))
    for lease in (one, two):
        with pytest.raises(paging.Full, match="2 pages of 4 tokens do not fit .* beside 3 others"):
            put(pool, MORE)
        assert found(pool, TALK[:12]) == 12 and pages(pool) == 3  # nothing has changed
        pool.release(lease)
    put(pool, MORE)
    assert found(pool, TALK[:12]) == 8


def test_a_leased_part_of_a_page_does_not_make_way_for_a_longer_one():
    pool = make()
    put(pool, TALK[:6])
    lease = pool.get(PARAMS, TALK[:7])
    put(pool, TALK[:8])
    assert pages(pool) == 3
    pool.release(lease)
    put(pool, TALK[:12])
    assert found(pool, TALK[:12]) == 12


@pytest.mark.parametrize("bits, stays", [((0, 1), 8), ((1, 0), 0)])
def test_bits_of_scores_say_who_leaves_and_what_goes_to_the_host(bits, stays):
    pool = make(4, pages=paging.mark_zero)
    one, two = TALK[:8], TALK[8:16]
    for tokens, bit in zip((one, two), bits, strict=True):
        put(pool, tokens, scores=np.full((2, 2, 8), 1.0 - bit))
    put(pool, MORE.tolist()[::-1])  # two pages without a bit
    assert pool.stats()["dropped"] == 2 and pages(pool, "host") == 0  # a page of bit 1 leaves first, and altogether
    assert (found(pool, one), found(pool, two)) == (stays, 8 - stays)


def test_a_page_of_bit_1_goes_to_the_host_if_one_behind_it_is_there():
    pool = make(2)
    scores = np.ones(8)
    scores[:4] = 0.0
    put(pool, TALK[:8], scores=scores)  # bits 1, 0
    put(pool, MORE)
    assert pages(pool, "host") == 2 and pool.stats()["dropped"] == 0
    assert found(pool, TALK[:8]) == 8


def test_reuse_predicts_that_what_was_asked_for_often_stays():
    pool = make(4, pages=paging.mark_zero, reuse=paging.Reuse())
    for _ in range(4):
        put(pool, TALK[:4])
    for i in range(6):
        put(pool, np.roll(MORE, i)[:4])
    assert pages(pool, "host") == 0 and found(pool, TALK[:4]) == 4


@pytest.mark.parametrize("rule", [paging.lru, paging.mark_zero], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("device, host, scored", [(5, 100, False), (5, 3, True), (4, 1, True), (4, 0, False)])
def test_whatever_is_done_pages_hold_what_was_put_and_chains_are_whole(rule, device, host, scored):
    draw = random.Random(device * host + scored)
    pool, said, leases = make(device, host_pages=host, pages=rule), [], []
    for number in range(60):
        tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 4 * device + 1))]  # few, so many begin alike
        if said and draw.random() < 0.5:
            base = draw.choice(said)
            tokens = [*base[: draw.randrange(1, len(base) + 1)], *tokens][: 4 * device]
        what = draw.random()
        try:
            if what < 0.4:
                put(pool, tokens, scores=[draw.random() ** 4 for _ in tokens] if scored else None)
                said.append(tokens)
            elif what < 0.8 or not leases:
                lease = pool.get(PARAMS, tokens)
                leases.append(lease)
                assert_holds(lease, tokens)
                longest = max((page_pool._alike(one, tokens) for one in said), default=0)
                assert lease.length <= min(longest, len(tokens) - 1)
                if host == 100:  # nothing is ever lost
                    assert lease.length == min(longest, len(tokens) - 1)
            else:
                pool.release(leases.pop(draw.randrange(len(leases))))
        except paging.Full:
            assert leases
        check_invariants(pool, leases, device, host)
        if number % 12 == 11:  # so that there is room for all again
            while leases:
                pool.release(leases.pop())
    assert pool.stats()["evicted"]["device"] > 10


def check_invariants(pool, leases, device, host):
    nodes = {key: node for key, node in pool._nodes.items() if key != pool._seed}
    slots = [node.slot for node in nodes.values() if node.slot is not None]
    assert sorted([*slots, *pool._free]) == list(range(device))  # each slot is free, or one page's
    assert {key for key, node in nodes.items() if node.slot is not None} == set(pool._device._size)
    on_host = {key for key, node in nodes.items() if node.host is not None}
    assert on_host == (set(pool._host._size) if host else set()) and len(on_host) <= host
    for key, node in nodes.items():
        assert node.slot is not None or node.host is not None
        assert key in pool._nodes[node.parent].children
        if node.slot is not None and node.parent != pool._seed:
            assert pool._nodes[node.parent].slot is not None  # else it would be of no use
    assert {key for lease in leases for key in lease.chain} == set(pool._leased)
    assert all(nodes[key].slot is not None for key in pool._leased)


# ---- what callers can get wrong ----


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"device_pages": 0}, "device_pages=0 must be at least 1"),
        ({"host_pages": -1}, "host_pages=-1 must be at least 0"),
        ({"page": 0}, "page=0 must be at least 1"),
        ({"pages": lambda k: paging.lru(3)}, "of the capacity that it is given"),
        ({"pages": lambda k: paging.mark_zero(k, lazy=False)}, "Take lazy=True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make(**settings)


def test_what_does_not_belong_is_refused_and_nothing_is_lost():
    pool = make(4)
    put(pool, TALK[:12])
    before, other, cache = pool.stats(), random_params(seed=1), cache_of(TALK[:6])
    h2o = kvjax.prefill(PARAMS, policies.h2o(8, window=2), TALK[None])[1]
    gone = cache_of(TALK[:6])
    gone.layers[1].v.delete()
    lossy = dataclasses.replace(cache.layers[0], pos=jnp.full_like(cache.layers[0].pos, FREE))
    half = dataclasses.replace(cache.layers[0], k=cache.layers[0].k.astype(jnp.bfloat16))
    wrong = {
        "5 pages of 4 tokens do not fit into device_pages=4": lambda: put(pool, TALK),
        "put: these params are not those of this pool": lambda: pool.put(other, TALK[:6], cache),
        "get: these params are not those of this pool": lambda: pool.get(other, TALK),
        "was made by h2o": lambda: pool.put(PARAMS, TALK, h2o),
        "must be a kvjax.Cache": lambda: pool.put(PARAMS, TALK, None),
        "seen 6 tokens, and 7 came": lambda: pool.put(PARAMS, TALK[:7], cache),
        "was donated": lambda: pool.put(PARAMS, TALK[:6], gone),
        "has lost some of its tokens": lambda: pool.put(
            PARAMS, TALK[:6], dataclasses.replace(cache, layers=(lossy, cache.layers[1]))
        ),
        "holds bfloat16": lambda: pool.put(
            PARAMS, TALK[:6], dataclasses.replace(cache, layers=(half, cache.layers[1]))
        ),
        "scores of 5 tokens came with 6": lambda: put(pool, TALK[:6], scores=np.zeros(5)),
        "outside 0..60": lambda: pool.get(PARAMS, [61]),
        "at least one": lambda: pool.get(PARAMS, []),
        "integers": lambda: pool.get(PARAMS, TALK[None]),
        "no lease of this pool": lambda: pool.release(make().get(PARAMS, TALK)),
    }
    for said, do in wrong.items():
        with pytest.raises(ValueError, match=said):
            do()
    lease = pool.get(PARAMS, TALK[:5])
    pool.release(lease)
    with pytest.raises(ValueError, match="was released before"):
        pool.release(lease)
    assert pool.stats()["pages"] == before["pages"] and found(pool, TALK[:12]) == 12


def test_other_tenants_see_nothing_and_an_equal_model_sees_all():
    mine, theirs = make(domain="me"), make(domain="them")
    assert mine._seed != theirs._seed
    put(mine, TALK[:8])
    assert mine.get(random_params(), TALK).length == 8
