import base64
import dataclasses
import functools
import html.parser
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import view
from kvjax.codecs import integer, pipe, prune_channels
from kvjax.files import write_whole
from kvjax.folds import fold, gather_losers, into_nearest
from kvjax.plans import by_layer
from kvjax.policy import evict
from kvjax.scorers import attention_mass, protect, recency
from kvjax.tiers import demote
from tests.tiny import CONFIG, random_params, random_tokens

AWKWARD = [
    "<s>",
    " a&b",
    "\"'",
    "</script>",
    "<script>alert(1)</script>",
    "\n\n",
    "🗼",
    "",
    "{{data}}",
    "\u2028",
    "  if",
]


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def unpack(data):
    bits = np.frombuffer(base64.b64decode(data["kept"]), np.uint8).reshape(data["layers"], data["heads"], -1)
    return np.unpackbits(bits, axis=-1, bitorder="little")[..., : len(data["tokens"])].astype(bool)


def shade(count, most):
    return -(-count * 8 // most)


# ---- kept ----


def test_kept_are_the_positions_in_the_slots_of_row_0():
    layers = (
        SimpleNamespace(pos=np.array([[[4, -1, 0], [1, 2, -1]], [[3, 3, 3], [3, 3, 3]]])),
        SimpleNamespace(pos=np.array([[[-1, -1, -1, -1], [0, 4, 3, 2]], [[3, 3, 3, 3], [3, 3, 3, 3]]])),
    )
    layers = [SimpleNamespace(tiers=(layer,)) for layer in layers]
    cache = SimpleNamespace(layers=layers, length=np.array([5, 9]), config=SimpleNamespace(kv_heads=2))
    expected = [[[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]], [[0, 0, 0, 0, 0], [1, 0, 1, 1, 1]]]
    np.testing.assert_array_equal(view.kept(cache), np.array(expected, bool))


def test_kept_of_a_prompt_counts_what_the_policy_keeps():
    policy = kvjax.policies.streaming_llm(6, sinks=2)
    _, cache = kvjax.prefill(random_params(), policy, jnp.arange(20)[None] % CONFIG.vocab)
    expected = np.isin(np.arange(20), [0, 1, 16, 17, 18, 19])
    np.testing.assert_array_equal(view.kept(cache), np.broadcast_to(expected, (CONFIG.layers, CONFIG.kv_heads, 20)))


# ---- bits ----


def bits_of(policy, count=20, dtype=jnp.float32):
    _, cache = kvjax.prefill(random_params(dtype=dtype), policy, random_tokens(1, count))
    return cache, view.bits(cache)


@pytest.mark.parametrize(("dtype", "full"), [(jnp.float32, 32), (jnp.bfloat16, 16)], ids=["f32", "bf16"])
def test_bits_of_plain_policies_are_those_of_the_dtype(dtype, full):
    cache, bits = bits_of(kvjax.policies.tova(8), dtype=dtype)
    np.testing.assert_array_equal(bits, full * view.kept(cache))
    assert not view.reduced(cache).any()


@pytest.mark.parametrize(("high", "shown"), [(16, 32), (8, 8)], ids=["whole", "int8"])
def test_bits_tell_the_tiers_of_mikv_apart(high, shown):
    cache, bits = bits_of(kvjax.policies.mikv(0.5, high_bits=high, low_bits=2, group=4))
    for layer, row in zip(cache.layers, bits, strict=True):
        for head in range(CONFIG.kv_heads):
            low = np.isin(np.arange(20), layer.low.pos[0, head])
            assert low.any() and not low.all()
            np.testing.assert_array_equal(row[head], np.where(low, 2, shown))
    np.testing.assert_array_equal(view.reduced(cache), bits < 32)


def test_bits_of_kivi_are_means_where_a_key_is_rounded_before_its_value():
    _, bits = bits_of(kvjax.policies.kivi(4, group=4, residual=8), count=21)  # 16 keys and 13 values are rounded
    np.testing.assert_array_equal(bits[1, 1], [4] * 13 + [(4 + 32) // 2] * 3 + [32] * 5)


def test_bits_of_think_count_pruned_channels_as_0():
    _, bits = bits_of(kvjax.policies.think(2, recent=6, window=4))  # of 8 channels
    np.testing.assert_array_equal(bits[0, 1], [(32 * 2 + 32 * 8) // 16] * 14 + [32] * 6)


def test_bits_of_codes_are_a_mean_of_key_and_value():
    codes = {"keys": pipe(prune_channels(4), integer(4, group=4)), "values": integer(8, group=4)}
    cache, bits = bits_of(kvjax.store(kvjax.policies.tova(8), **codes))
    np.testing.assert_array_equal(bits, round((4 * 4 + 8 * 8) / 16) * view.kept(cache))


# ---- merged ----


def merges(policy, count):
    """Kept positions, and what was found to be merged, of which the basics are checked; and the cache."""
    params, tokens = random_params(), random_tokens(1, count, seed=3)
    _, cache = kvjax.prefill(params, policy, tokens)
    kept, merged = view.kept(cache), view.merged(params, policy, tokens)
    assert merged.why == ""
    gone = merged.into >= 0
    assert not (gone & kept).any()
    assert np.take_along_axis(kept, merged.into.clip(0), axis=2)[gone].all()  # they live on in kept ones
    np.testing.assert_array_equal(merged.parts > 0, gone)
    return kept, merged, cache


def test_merged_are_the_nearest_anchors_where_elastic_cache_folds():
    kept, merged, _ = merges(kvjax.policies.elastic_cache(0.6, sinks=1, last=1), 20)
    anchors = np.flatnonzero(kept[0, 0])[1:-1]
    for lost in np.flatnonzero(~kept[0, 0]):
        assert merged[0, 0, lost] == min(anchors, key=lambda anchor: (abs(anchor - lost), anchor))


@pytest.mark.parametrize(
    ("policy", "count"),
    [
        (kvjax.policies.elastic_cache(0.985, sinks=1, last=1), 200),  # one anchor takes 197
        (kvjax.policies.ems(24, window=8, similar=0, keep=1, merge=300), 240),
        (kvjax.policies.kvmerger(24, window=8, heavy=4), 240),
    ],
    ids=["elastic_cache", "ems", "kvmerger"],
)
def test_all_that_is_lost_is_shown_where_it_all_is_merged(policy, count):
    kept, merged, _ = merges(policy, count)
    np.testing.assert_array_equal(merged.into >= 0, ~kept)
    assert merged.parts.max() == 1


@pytest.mark.parametrize("settings", [{}, {"rule": "threshold", "threshold": -0.9}], ids=["budget", "threshold"])
def test_as_many_are_shown_as_kvmerger_says_that_it_joined(settings):
    kept, merged, cache = merges(kvjax.policies.kvmerger(24, window=8, heavy=4, **settings), 240)
    for layer, row in zip(cache.layers, merged.into, strict=True):
        pos, joined = np.asarray(layer.pos[0]), np.asarray(layer.stats["joined"][0])
        for head in range(CONFIG.kv_heads):
            into = np.bincount(row[head][row[head] >= 0], minlength=240)
            there = pos[head] >= 0
            np.testing.assert_array_equal(into[pos[head, there]], joined[head, there])
            assert into.sum() > 200


def test_a_weight_that_is_lost_beside_others_is_shown():
    params, tokens = random_params(), random_tokens(1, 6)

    def fate(cache, kept, seen, most):
        losers = gather_losers(cache, kept, most)
        weight = jnp.broadcast_to(jnp.asarray([1e-37, 1e-20, 0.0]), losers.slot.shape)
        target = jnp.argmax(kept, axis=-1, keepdims=True)
        return fold(cache, kept, losers, jnp.broadcast_to(target, weight.shape), weight, weight, seen)

    merged = view.merged(params, evict(recency(), budget=3, fate=fate), tokens)
    np.testing.assert_array_equal(merged.into[1], [[3, 3, -1, -1, -1, -1]] * CONFIG.kv_heads)


def test_as_many_are_shown_as_d2o_finds_similar():
    params, tokens = random_params(), random_tokens(1, 60, seed=3)
    settings = {"window": 4, "sinks": 2, "gate": "per_head"}
    _, cache = kvjax.prefill(params, evict(protect(attention_mass(), sinks=2, window=4), budget=12), tokens)
    _, full = kvjax.prefill(params, kvjax.policies.full(), tokens)
    merged = view.merged(params, kvjax.policies.d2o(12, **settings), tokens)
    for layer, held, row in zip(full.layers, view.kept(cache), merged.into, strict=True):
        unit = np.asarray(layer.k[0], np.float64)
        unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
        cosine = np.where(held[:, None], unit @ unit.swapaxes(1, 2), -np.inf)  # of each token with the kept ones
        best = np.where(held, np.nan, cosine.max(axis=2))
        similar = best >= np.nanmean(best)
        np.testing.assert_array_equal(row, np.where(similar, cosine.argmax(axis=2), -1))


def test_of_the_tokens_that_cam_gives_to_the_largest_is_shown_and_all_are_counted():
    kept, merged, _ = merges(kvjax.policies.cam(9, sinks=1, targets=4), 10)  # one loser, at 1
    gone = merged.into >= 0
    assert gone.any()
    assert not gone[..., [0, *range(2, 10)]].any()
    assert (merged.into[gone] == 2).all()  # equal parts: the first
    assert (merged.parts[gone] == 4).all()
    _, merged, _ = merges(kvjax.policies.cam(9, sinks=1, targets=2), 60)
    assert merged.into.max() == 52  # where the window begins: what is lost moves on to it
    assert merged.parts.max() == 2


def test_merges_of_a_plan_are_those_of_each_layers_own_policy():
    d2o, elastic = kvjax.policies.d2o(12, window=4), kvjax.policies.elastic_cache(0.6)
    _, merged, _ = merges(by_layer([d2o, elastic]), 40)
    np.testing.assert_array_equal(merged.into[0], merges(d2o, 40)[1].into[0])
    np.testing.assert_array_equal(merged.into[1], merges(elastic, 40)[1].into[1])


def test_merges_in_a_lower_tier_are_shown():
    low = kvjax.store(evict(recency(), budget=8, fate=into_nearest(-1.0)), keys=integer(4, group=4))
    kept, merged, _ = merges(demote(recency(), low, budget=4), 40)
    np.testing.assert_array_equal(merged.into >= 0, ~kept)


def test_tokens_followed_in_parts_go_where_they_go_at_once(monkeypatch):
    params, tokens = random_params(), random_tokens(1, 40)
    make = functools.partial(kvjax.policies.d2o, 12, window=4, sinks=3)
    want = view.merged(params, make(), tokens)
    monkeypatch.setattr(view, "AT_ONCE", 16)
    view._tracing.cache_clear()  # a policy of another identity is traced anew
    got = view.merged(params, make(), tokens)
    np.testing.assert_array_equal(got.into, want.into)
    np.testing.assert_array_equal(got.parts, want.parts)


def test_what_is_not_merged_or_not_shown_says_why():
    params, tokens = random_params(), random_tokens(1, 20)

    def why(policy):
        merged = view.merged(params, policy, tokens)
        assert merged.into is None
        assert merged.parts is None
        return merged.why

    tova = kvjax.policies.tova(8)
    for policy in (tova, kvjax.policies.mikv(0.5, group=4), kvjax.policies.kivi(4, group=4, residual=8)):
        assert why(policy) == "No token is merged into another."
    always = dataclasses.replace(tova, stepwise="always")
    assert "token by token" in why(always)
    assert "token by token" in why(by_layer([tova, always]))
    assert "given statistics" in why(dataclasses.replace(tova, given=frozenset({"score"})))


# ---- page ----


def test_data_survive_the_way_through_the_page():
    kept = np.random.default_rng(0).random((3, 2, len(AWKWARD))) < 0.5
    data = data_of(view.page(AWKWARD, kept, title="t"))
    assert data["tokens"] == AWKWARD
    np.testing.assert_array_equal(unpack(data), kept)


def test_bits_survive_the_way_through_the_page():
    rng = np.random.default_rng(0)
    kept = rng.random((3, 2, len(AWKWARD))) < 0.5
    bits = rng.choice([2, 3, 4, 8, 32], kept.shape)
    packed = data_of(view.page(AWKWARD, kept, title="t", bits=bits))["bits"]
    assert packed["levels"] == [2, 3, 4, 8, 32]
    planes = [unpack({"layers": 3, "heads": 2, "tokens": AWKWARD, "kept": plane}) for plane in packed["planes"]]
    which = sum(plane.astype(int) << digit for digit, plane in enumerate(planes))
    np.testing.assert_array_equal(np.array(packed["levels"])[which][kept], bits[kept])
    plain = data_of(view.page(AWKWARD, kept, title="t", bits=np.full(kept.shape, 32)))["bits"]
    assert plain == {"levels": [32], "planes": []}


def test_page_refuses_bits_and_merges_of_another_shape():
    kept, other = np.ones((1, 2, 3), bool), np.ones((1, 2, 4), int)
    with pytest.raises(ValueError, match=r"bits has shape \[1, 2, 4\] and must have that of kept, \[1, 2, 3\]"):
        view.page(["a"] * 3, kept, title="t", bits=other)
    with pytest.raises(ValueError, match=r"merged.into has shape \[1, 2, 4\]"):
        view.page(["a"] * 3, kept, title="t", merged=view.Merged(other, other, ""))


def test_no_text_can_open_or_close_an_element():
    kept = np.ones((1, 1, len(AWKWARD)), bool)
    plain = view.page(["a"] * len(AWKWARD), kept, title="t", subtitle="s")
    awkward = view.page(AWKWARD, kept, title="</title><b>{{data}}", subtitle="<!-- & \"'")
    assert [awkward.count(x) for x in ("<script", "</script", "<!--", "<b>")] == [
        plain.count(x) for x in ("<script", "</script", "<!--", "<b>")
    ]
    assert "<h1>&lt;/title&gt;&lt;b&gt;{{data}}</h1>" in awkward


def test_page_refers_to_nothing_outside():
    page = view.page(["a"], np.ones((1, 1, 1), bool), title="t")
    assert not re.search(r"https?:|//\w|@import|url\(|<link|<img|\ssrc=", page)


def test_a_long_prompt_of_a_large_model_stays_under_a_megabyte():
    page = view.page([" token"] * 8000, np.ones((32, 8, 8000), bool), title="t")
    assert len(page) < 1_000_000


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_ink_is_readable_on_every_shade_and_shades_are_ordered(scheme):
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    page = view.page(["a"], np.ones((1, 1, 1), bool), title="t")
    blocks = re.findall(r":root \{(.*?)\}", page, re.S)
    assert len(blocks) == 2
    color = dict(re.findall(r"--(\w+): (#\w{6})", blocks[scheme]))
    pairs = [("page", "ink"), ("page", "quiet"), *((f"s{i}", f"i{i}") for i in range(1, 9))]
    assert {
        pair: contrast(color[pair[0]], color[pair[1]]) for pair in pairs if contrast(*map(color.get, pair)) < 4.5
    } == {}
    steps = np.diff([luminance(color[name]) for name in ["page", *(f"s{i}" for i in range(1, 9))]])
    assert (steps < 0).all() or (steps > 0).all()


@pytest.mark.parametrize("kept", [np.ones((2, 3), bool), np.ones((1, 2, 3)), np.ones((0, 2, 3), bool)])
def test_page_refuses_what_is_not_a_kept_set(kept):
    with pytest.raises(ValueError, match=r"must be bool\[L, H, n\]"):
        view.page(["a"] * 3, kept, title="t")


def test_page_refuses_tokens_and_kept_of_different_lengths():
    with pytest.raises(ValueError, match="2 tokens and kept has 3 positions"):
        view.page(["a", "b"], np.ones((1, 1, 3), bool), title="t")


# ---- write ----


def test_write_replaces_a_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    write_whole(path, "new 🗼")
    assert path.read_text("utf-8") == "new 🗼"
    assert list(tmp_path.iterdir()) == [path]


def test_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "page.html"
    path.mkdir()
    with pytest.raises(OSError):
        write_whole(path, "new")
    assert list(tmp_path.iterdir()) == [path]


# ---- in a browser ----


class Page(html.parser.HTMLParser):
    """Of the page as Chromium has built it: the token spans, with class and text, and the attributes by id."""

    def __init__(self, dom):
        super().__init__()
        self.tokens, self.cells, self.by_id, self.text, self.inside = [], [], {}, {}, []
        self.feed(dom)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "span" and self.inside and self.inside[-1] == "text":
            self.tokens.append({"shade": int(attrs["class"][1]), "current": "aria-current" in attrs, "text": ""})
            self.tokens[-1]["title"] = attrs.get("title")
        if tag == "b" and "title" in attrs and self.inside[-1] == "matrix":
            self.cells.append((attrs["title"], attrs["class"].removesuffix(" off")))
        if "id" in attrs:
            self.by_id[attrs["id"]] = attrs
        if tag not in ("meta", "input"):  # these have no end
            self.inside.append(attrs.get("id", tag))

    def handle_endtag(self, tag):
        if self.inside:
            self.inside.pop()

    def handle_data(self, data):
        for name in self.inside:
            self.text[name] = self.text.get(name, "") + data
        if "text" in self.inside and self.inside[-1] == "span":
            self.tokens[-1]["text"] += data


@pytest.fixture
def render(tmp_path):
    """Opens a page and gives the DOM after its script has run."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the path")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --dump-dom"
    ).split()

    def render(page, address=""):
        write_whole(tmp_path / "page.html", page)
        url = (tmp_path / "page.html").as_uri() + address
        command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", url]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
        return Page(done.stdout)

    return render


def make_case():
    tokens = [" tok", "en", *AWKWARD, *(f" {i}" for i in range(20))]
    return tokens, np.random.default_rng(1).random((5, 3, len(tokens))) < 0.4


def test_browser_shows_every_token_in_its_shade(render):
    tokens, kept = make_case()
    page = render(view.page(tokens, kept, title="h2o & <co>", subtitle="tiny"))
    assert [token["text"] for token in page.tokens] == [re.sub(r"^ +(?=\S)", "", token) for token in tokens]
    assert page.text["text"] == "".join(tokens)
    assert [token["shade"] for token in page.tokens] == [shade(count, 15) for count in kept.sum((0, 1))]
    assert page.text["h1"] == "h2o & <co>"
    assert page.by_id["layer"]["max"] == "5"
    assert page.by_id["strip"]["aria-label"].startswith("One row per layer; a head keeps ")


def test_browser_shows_the_layer_and_the_token_of_the_address(render):
    tokens, kept = make_case()
    kept[3, :, 12] = [True, False, True]
    kept[4, :, 12] = False
    page = render(view.page(tokens, kept, title="t"), "#layer=3&token=12")
    assert [token["shade"] for token in page.tokens] == [shade(count, 3) for count in kept[3].sum(0)]
    assert [i for i, token in enumerate(page.tokens) if token["current"]] == [12]
    assert page.by_id["layer"]["aria-valuetext"] == "layer 3"
    assert page.text["count"] == f"Kept by 2 of 3 heads in layer 3, {kept[:, :, 12].sum()} in all"
    assert page.by_id["matrix"]["aria-label"].endswith("layer 3: 0, 2; layer 4: none")


def test_browser_follows_the_slider(render):
    tokens, kept = make_case()
    move = "<script>$('layer').value = 2; $('layer').dispatchEvent(new Event('input'));</script></body>"
    page = render(view.page(tokens, kept, title="t").replace("</body>", move))
    assert [token["shade"] for token in page.tokens] == [shade(count, 3) for count in kept[1].sum(0)]
    assert page.text["which"] == "1"  # the slider's 0 is all layers


def test_browser_shades_by_bits_and_says_them(render):
    tokens, kept = make_case()
    kept[2, :, 7] = [True, True, False]
    bits = np.random.default_rng(2).choice([2, 8], kept.shape)
    bits[2, :2, 7] = [8, 2]
    page = render(view.page(tokens, kept, title="t", bits=bits), "#layer=2&token=7")
    sums = np.where(kept[2], bits[2], 0).sum(0)
    assert [token["shade"] for token in page.tokens] == [shade(total, 3 * 8) for total in sums]
    assert [token["title"] for token in page.tokens] == [
        f"{round(float(total / 3), 1):g} bits a number, mean over 3 heads" for total in sums
    ]
    assert page.text["unit"] == "Bits of a token, mean over heads"
    assert page.text["legend"] == "0≤1≤2≤3≤4≤5≤6≤7≤8"
    assert page.text["size"].endswith(" · 2 or 8 bits a number")
    assert page.text["form"] == "Bits of a number: 8 in 1 head, 2 in 1 head."
    assert page.text["count"].startswith("Kept by 2 of 3 heads in layer 2")
    titles = {title: shown for title, shown in page.cells if title.startswith("layer 2,")}
    assert titles == {
        "layer 2, head 0: 8 bits": "s8",
        "layer 2, head 1: 2 bits": "s2",
        "layer 2, head 2: not kept": "s0",
    }


def test_browser_says_the_one_number_of_bits_of_a_plain_policy(render):
    tokens, kept = make_case()
    kept[:, :, 7] = True
    page = render(view.page(tokens, kept, title="t", bits=np.full(kept.shape, 16)), "#token=7")
    assert [token["shade"] for token in page.tokens] == [shade(count, 15) for count in kept.sum((0, 1))]
    assert page.text["size"].endswith(" · 16 bits a number")
    assert page.text["form"] == "Bits of a number: 16 in 15 heads."
    assert page.text["unit"] == "Heads that keep a token"


def test_browser_says_where_a_token_went_and_in_how_many_parts(render):
    tokens, kept = make_case()
    kept[:] = True
    kept[1, :, 7] = False
    into, parts = np.full(kept.shape, -1), np.zeros(kept.shape, int)
    into[1, :2, 7], parts[1, :2, 7] = 14, [3, 32]
    page = view.page(tokens, kept, title="t", merged=view.Merged(into, parts, ""))
    shown = render(page, "#layer=1&token=7")
    assert shown.text["form"] == "Merged into “1” at 14 (2 heads). That is the largest of 3 to 32 parts."
    assert shown.text["merges"] == "0.1 tokens of a head, on average, are merged into others."
    assert ("layer 1, head 1: merged into 14", "s0 merged") in shown.cells
    assert render(page, "#layer=1&token=14").text["form"] == "Takes in 1 token, underlined."


def test_browser_says_why_no_merges_are_shown(render):
    tokens, kept = make_case()
    assert render(view.page(tokens, kept, title="t")).text["merges"] == view.NOT_SOUGHT
    why = render(view.page(tokens, kept, title="t", merged=view.Merged(None, None, "It does not merge.")))
    assert why.text["merges"] == "It does not merge."
