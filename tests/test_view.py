import base64
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
from kvjax.files import write_whole
from tests.tiny import CONFIG, random_params

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


def test_reduced_are_the_tokens_of_the_lower_tier_and_what_a_form_has_rounded():
    params, tokens = random_params(), jnp.arange(20)[None] % CONFIG.vocab
    _, cache = kvjax.prefill(params, kvjax.policies.mikv(0.5, low_bits=4, group=4), tokens)
    reduced = view.reduced(cache)
    assert view.kept(cache).all()
    for i, layer in enumerate(cache.layers):
        for head in range(CONFIG.kv_heads):
            low = [p for p in np.asarray(layer.low.pos)[0, head] if p >= 0]
            assert np.flatnonzero(reduced[i, head]).tolist() == sorted(low)
    _, cache = kvjax.prefill(params, kvjax.policies.kivi(4, group=4, residual=8), tokens)
    np.testing.assert_array_equal(view.reduced(cache)[0, 0], np.arange(20) < 12)
    _, cache = kvjax.prefill(params, kvjax.policies.tova(8), tokens)
    assert not view.reduced(cache).any()


def test_merged_are_the_nearest_anchors_where_elastic_cache_folds():
    params, tokens = random_params(), jnp.arange(20)[None] % CONFIG.vocab
    policy = kvjax.policies.elastic_cache(0.6, sinks=1, last=1)
    _, cache = kvjax.prefill(params, policy, tokens)
    kept, merged = view.kept(cache), view.merged(params, policy, tokens)
    anchors = np.flatnonzero(kept[0, 0])[1:-1]
    for lost in np.flatnonzero(~kept[0, 0]):
        assert merged[0, 0, lost] == min(anchors, key=lambda anchor: (abs(anchor - lost), anchor))
    assert (merged[kept] == -1).all()


def test_nothing_is_merged_by_methods_that_only_drop():
    params, tokens = random_params(), jnp.arange(20)[None] % CONFIG.vocab
    for policy in (
        kvjax.policies.tova(8),
        kvjax.policies.mikv(0.5, group=4),
        kvjax.policies.kivi(4, group=4, residual=8),
    ):
        assert view.merged(params, policy, tokens) is None


# ---- page ----


def test_data_survive_the_way_through_the_page():
    kept = np.random.default_rng(0).random((3, 2, len(AWKWARD))) < 0.5
    data = data_of(view.page(AWKWARD, kept, title="t"))
    assert data["tokens"] == AWKWARD
    np.testing.assert_array_equal(unpack(data), kept)


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
        self.tokens, self.by_id, self.text, self.inside = [], {}, {}, []
        self.feed(dom)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "span" and self.inside and self.inside[-1] == "text":
            self.tokens.append({"shade": int(attrs["class"][1]), "current": "aria-current" in attrs, "text": ""})
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
