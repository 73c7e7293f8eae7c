"""A wrong setting of a method or a codec is a ValueError when it is made, that says what came and what was wanted."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer.testing

from kvjax import codecs, compare, policies, store
from kvjax.cache import LayerShape
from kvjax.cli import app
from kvjax.counts import flag, real, whole

NAN, INF = float("nan"), float("inf")
BALANCED = codecs.pipe(codecs.balance(), codecs.integer(4, group=2))
NEEDED = {"budget": 64, "window": 32, "heavy": 8, "channels": 4}  # what has no default
ALSO_CALLED = {"low_bits": "bits", "channels": "keep"}  # by the codec that refuses it


def made(name, **settings):
    """A policy, with sane values for what has no default and is not given."""
    make = getattr(policies, name)
    required = {key for key, one in inspect.signature(make).parameters.items() if one.default is one.empty}
    required |= {"window"} if name == "snapkv" else set()  # whose default does not fit into so small a budget
    return make(**({key: NEEDED[key] for key in required} | settings))


def settings_of(kind):
    """(method, setting, whether it may be None) of all that are annotated as `kind`, alone or with others."""
    for name in policies.__all__:
        for key, one in inspect.signature(getattr(policies, name)).parameters.items():
            kinds = getattr(one.annotation, "__args__", (one.annotation,))
            if kind in kinds:
                yield name, key, type(None) in kinds


def wrong(kind, values):
    return pytest.mark.parametrize(
        "name, key, value",
        [
            pytest.param(name, key, value, id=f"{name}({key}={value!r:.12})")
            for name, key, optional in settings_of(kind)
            for value in values
            if not (optional and value is None)
        ],
    )


def refused(name, key, value):
    with pytest.raises(ValueError, match=rf"\w+: .*\b({key}|{ALSO_CALLED.get(key, key)})="):
        made(name, **{key: value})


@wrong(int, [2.5, "x", None, NAN, True, -(10**12), 10**12])
def test_a_count_is_a_whole_number_of_32_bits(name, key, value):
    refused(name, key, value)


@wrong(float, [NAN, INF, -INF, "x", None, 1j, 10**400])
def test_a_share_is_a_finite_number(name, key, value):
    refused(name, key, value)


@wrong(bool, ["no", None, 2])
def test_a_switch_is_true_or_false(name, key, value):
    refused(name, key, value)


@pytest.mark.parametrize("value", ["best", None, 5])
@pytest.mark.parametrize("name, key", [(name, key) for name, key, _ in settings_of(str)])
def test_a_choice_is_one_of_those_there_are(name, key, value):
    if (key, value) != ("sigma", 5):  # which may be a width
        refused(name, key, value)


def test_every_kind_of_setting_is_among_these():
    kinds = {
        kind
        for name in policies.__all__
        for one in inspect.signature(getattr(policies, name)).parameters.values()
        for kind in getattr(one.annotation, "__args__", (one.annotation,))
    }
    assert kinds - {type(None), policies.full().__class__} == {int, float, bool, str}


def case(match, call, *args, **settings):
    shown = ", ".join(
        [*(getattr(arg, "name", str(arg)) for arg in args), *(f"{key}={value!r}" for key, value in settings.items())]
    )
    call = functools.partial(made, call) if isinstance(call, str) else call
    name = getattr(call, "__name__", None) or call.args[0]
    return pytest.param(functools.partial(call, *args, **settings), match, id=f"{name}({shown:.60})")


@pytest.mark.parametrize(
    "call, match",
    [
        # Methods that evict.
        case("sinks=64 is outside 0..63", "streaming_llm", sinks=64),
        case("sinks=-1 is outside 0..63", "streaming_llm", sinks=-1),
        case("budget='64' must be a whole number", "streaming_llm", budget="64"),
        case("h2o: window=64 is outside 1..63.*raise budget", "h2o", window=64),
        case("h2o: budget=1000000000000 must be at most 2147483647.*32 bits", "h2o", budget=10**12),
        case("window=16.0 must be a whole number", "h2o", window=16.0),
        case("prompt='sparse' must be 'dense' or 'greedy'", "h2o", prompt="sparse"),
        case("positions='new' must be 'true' or 'rolling'", "h2o", positions="new"),
        case("window=0 is outside", "snapkv", window=0),
        case("pool=2 is not a positive odd number", "snapkv", pool=2),
        case("pool=3.0 must be a whole number", "snapkv", pool=3.0),
        case("tova: budget=0 leaves no slot", "tova", budget=0),
        case("budget=None must be a whole number", "tova", budget=None),
        case("keydiff: budget=-1 leaves no slot", "keydiff", budget=-1),
        case("budget=True must be a whole number", "keydiff", budget=True),
        case("random: budget=0 leaves no slot", "random", budget=0),
        case("seed=4294967296 must be at most 4294967295", "random", seed=2**32),
        case("seed=-1 is outside", "random", seed=-1),
        case("sinks=40 must be at least 1 and 0, and leave a slot", "expected_attention", sinks=40),
        case("window=0 and sinks=4 must be", "expected_attention", window=0),
        case("first=60 and last=4 must not fill budget=64", "compactor", first=60),
        case("last=-1 must not fill", "compactor", last=-1),
        case("pool=4 a positive odd number", "compactor", pool=4),
        case("sketch=0 and chunk=256 must be at least 1", "compactor", sketch=0),
        case("blend=nan must be a finite number at least 0. None takes", "compactor", blend=NAN),
        case("blend='x' must be a finite number", "compactor", blend="x"),
        case("scale=inf must be a finite number at least 0. None takes", "compactor", scale=INF),
        case("scale=-1 must be a finite number at least 0", "compactor", scale=-1),
        # Methods that merge.
        case("window=63 must be at least 0 and 1, and fit into budget=64", "d2o", window=63),
        case(
            "smoothing=1.5 must be a finite number at least 0 and at most 1. The paper's is 0.7", "d2o", smoothing=1.5
        ),
        case("smoothing=None must be a finite number", "d2o", smoothing=None),
        case("weights='mean' must be 'exp' or 'code_mean'", "d2o", weights="mean"),
        case("gate='none' must be", "d2o", gate="none"),
        case("into_sinks='no' must be True or False", "d2o", into_sinks="no"),
        case("sinks=64 and window=0 must fit into budget=64", "cam", sinks=64),
        case("targets=0 must be at least 1. The paper's code takes", "cam", targets=0),
        case("targets=1000000000000 must be at most", "cam", targets=10**12),
        case("heavy='no' must be True or False", "cam", heavy="no", window=8),
        case("window=8 goes with heavy=True", "cam", window=8),
        case("cam: prompt='sparse' must be 'dense' or 'greedy'", "cam", prompt="sparse"),
        case("cam: positions='new' must be 'true' or 'rolling'", "cam", positions="new"),
        case("ems: window=64 is outside 1..63", "ems", window=64),
        case("keep=0 must be a finite number above 0 and at most 1", "ems", keep=0),
        case("keep=None must be a finite number", "ems", keep=None),
        case("similar='abc' must be a finite number at least 0", "ems", similar="abc"),
        case("merge=2.5 must be a whole number. None allows four", "ems", merge=2.5),
        case("merge=nan must be a whole number", "ems", merge=NAN),
        case("merge=inf must be a whole number", "ems", merge=INF),
        case("merge=-1 must be at least 0", "ems", merge=-1),
        case("combine='sum' must be 'max', 'mean'", "ems", combine="sum"),
        case("redundancy='key' must be 'clipped' or 'raw'", "ems", redundancy="key"),
        case("transfer=None must be True or False", "ems", transfer=None),
        case("heavy=40 must be at least 1 and 0, and fit into", "kvmerger", heavy=40),
        case("threshold=nan must be a finite number at least -1 and at most 1", "kvmerger", threshold=NAN),
        case("threshold=5 must be a finite number at least -1 and at most 1. It is a cosine", "kvmerger", threshold=5),
        case("threshold='x' must be a finite number", "kvmerger", threshold="x"),
        case("sigma=inf must be a finite number above 0. Or give 'mean_dist'", "kvmerger", sigma=INF),
        case("sigma=0 must be a finite number above 0", "kvmerger", sigma=0),
        case("sigma='mean' must be", "kvmerger", sigma="mean"),
        case("every=0 must be at least 1", "kvmerger", every=0),
        case("rule='all' must be", "kvmerger", rule="all"),
        case("pruned=1.0 must be a finite number at least 0 and below 1. It is the share", "elastic_cache", pruned=1.0),
        case("pruned=0.9999 is too near 1.*Give at most 0.999", "elastic_cache", pruned=0.9999),
        case("pruned=None must be a finite number", "elastic_cache", pruned=None),
        case("distance=1000000000000 must be at most 2147483647", "elastic_cache", distance=10**12),
        case("last=-1 and distance=25 must not be negative", "elastic_cache", last=-1),
        case("selection='topk' must be 'attended' or 'official'", "elastic_cache", selection="topk"),
        # Methods that store what is less important in a smaller form.
        case("ratio=1.5 must be a finite number at least 0 and at most 1", "mikv", ratio=1.5),
        case("ratio='abc' must be a finite number", "mikv", ratio="abc"),
        case("heavy=None must be a finite number", "mikv", heavy=None),
        case("high_bits=5 must be 2, 3, 4, 8 or 16", "mikv", high_bits=5),
        case("bits=5 must be 2, 3, 4 or 8", "mikv", low_bits=5),
        case("group=0 must be at least 1. It is a divisor of head_dim", "mikv", group=0),
        case("balanced='no' must be True or False", "mikv", balanced="no"),
        case("mass='max' must be 'sum' or 'mean'", "mikv", mass="max"),
        case("window=0 must be at least 1. None asks all", "mikv", window=0),
        case("mass='mean' is over all queries, and window=8 asks some", "mikv", mass="mean", window=8),
        case("bits=1 must be 2, 3, 4 or 8", "kivi", bits=1),
        case("group=0 must be at least 1", "kivi", group=0),
        case("residual=0 must be a multiple", "kivi", residual=0),
        case("residual=100 must be a multiple of group=32", "kivi", residual=100),
        case("keep=0 must be at least 1", "think", channels=0),
        case("recent=0 must be at least 1. codecs.prune_channels alone", "think", recent=0),
        case("window=0 must be at least 1", "think", window=0),
        case("answer=-1 must be at least 0. It counts tokens", "think", answer=-1),
        case("policy='h2o' is no policy", "think", tokens="h2o"),
        # Codecs.
        case("bits=5 must be 2, 3, 4 or 8", codecs.integer, 5),
        case("bits=4.0 must be a whole number", codecs.integer, 4.0),
        case(r"bits=\[4\] must be a whole number", codecs.integer, [4]),
        case("group=0 must be at least 1", codecs.integer, 4, group=0),
        case("group='all' must be a whole number", codecs.integer, 4, group="all"),
        case("keep=0 must be at least 1", codecs.prune_channels, 0),
        case("keep=2.5 must be a whole number", codecs.prune_channels, 2.5),
        case("window='x' must be a whole number", codecs.prune_channels, 4, window="x"),
        case("pipe: 'x' is no codec. Make one", codecs.pipe, codecs.prune_channels(4), "x"),
        case("pipe: None is no codec", codecs.pipe, None, codecs.integer(4)),
        case(r"pipe: \[\] is no codec", codecs.pipe, codecs.prune_channels(4), []),
        case(
            "pipe: by_channel.* shared words, which only kivi's own form can hold. Take policies.kivi",
            codecs.pipe,
            codecs.prune_channels(4),
            codecs.by_channel(codecs.integer(4), 32),
        ),
        case(
            "store: keys=by_channel.* blocks of tokens in shared words.* or codecs.integer",
            store,
            policies.full(),
            keys=codecs.by_channel(codecs.integer(4), 32),
        ),
        case("store: keys='int4' is no codec", store, policies.mikv(), keys="int4"),  # which has two tiers
        case("int4 stores codes.*Put it last", codecs.pipe, codecs.integer(4), codecs.balance()),
        case("block=6 must be a multiple of int4's group=32", codecs.by_channel, codecs.integer(4), 6),
        case(r"int4 \(group=None\) takes half of the channels", codecs.by_channel, codecs.integer(4, group=None), 32),
        case("block=0 must be at least 1", codecs.by_channel, codecs.integer(4), 0),
        case("block=32.0 must be a whole number", codecs.by_channel, codecs.integer(4), 32.0),
        case("2 channels rounds nothing.*made by integer", codecs.by_channel, codecs.prune_channels(2), 8),
        case("balanced, int4.* rounds nothing", codecs.by_channel, BALANCED, 8),
        case("4 rounds nothing.*made by integer", codecs.by_channel, 4, 8),
    ],
)
def test_wrong_settings_are_refused_by_name(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("value", [True, np.bool_(True), jnp.zeros(2), "1", None, NAN, -INF, 10**400, 1 + 0j])
def test_what_is_no_real_number(value):
    with pytest.raises(ValueError, match=r"f: x=.* must be a finite number at least 0 and below 2\. Mend it\."):
        real("f", "x", value, least=0, below=2, mend="Mend it.")


def test_what_is_right_comes_back_as_a_plain_number():
    for value in (1, np.float32(1), np.int64(1), 1.0):
        assert type(real("f", "x", value, least=1, most=1)) is float
    assert type(whole("f", "x", np.int8(3))) is int
    assert flag("f", "x", np.True_) is True
    assert whole("f", "x", 2**31 - 1) == 2**31 - 1
    with pytest.raises(ValueError, match="x=2147483648 must be at most 2147483647"):
        whole("f", "x", 2**31)


def test_the_largest_settings_and_none_are_as_good_as_others():
    policies.random(8, seed=2**32 - 1)
    policies.ems(64, merge=0, keep=1, similar=0)
    policies.compactor(64, blend=None, scale=None)
    policies.elastic_cache(0)
    policies.cam(5)  # fewer than the targets it has by default
    assert codecs.integer(4) is codecs.integer(np.int64(4), group=32)


@pytest.mark.parametrize(
    "given, said",
    [
        ("mikv --set ratio=abc", "kvjax: mikv: ratio='abc' must be a finite number"),
        ("mikv --set balanced=no", "kvjax: mikv: balanced='no' must be True or False."),
        ("ems --budget 64 --set similar=abc", "kvjax: ems: similar='abc' must be a finite number"),
        ("ems --budget 64 --set merge=2.5", "kvjax: ems: merge=2.5 must be a whole number."),
        ("think --set channels=4 --set tokens=h2o", "kvjax: policy='h2o' is no policy."),
    ],
)
def test_the_command_says_so_in_a_line(given, said):
    result = typer.testing.CliRunner().invoke(app, ["generate", "hello", "--policy", *given.split()])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize("head_dim", [32, 40, 64, 72, 80, 96, 100, 128])
@pytest.mark.parametrize("number", [2, 4])
def test_comparisons_plan_only_what_fits_the_heads(head_dim, number):
    size = compare.Size(fractions=(0.9, 0.6, 0.5, 0.4, 0.25))
    rows = compare.plan(["mikv", "kivi"], size, head_dim, number)
    assert {row.method for row in rows} >= {"full", "mikv"}
    for row in rows:
        jax.eval_shape(functools.partial(row.policy.empty, LayerShape(1, 1, 256, head_dim, jnp.float32, 0)))
        if head_dim == 80 and row.method == "kivi":
            assert "group=16" in str(row.policy)
