"""What runs where: by name, by machine, and over several devices."""

import importlib.util
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import kvjax
from pallas_kernels import dispatch, triton_call
from pallas_kernels.topk_slots import topk_slots


@pytest.fixture
def machine(monkeypatch):
    """Lets this machine pass for one with a GPU of some capability."""

    def pretend(capability, with_jax_triton=True):
        device = types.SimpleNamespace(device_kind="Some GPU", compute_capability=capability)
        found = importlib.util.find_spec
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: with_jax_triton or None if name == "jax_triton" else found(name)
        )
        dispatch.here.cache_clear()

    yield pretend
    dispatch.here.cache_clear()


def fits(_):
    return None


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_a_gpu_that_the_kernels_are_compiled_for_runs_them(machine, capability):
    machine(capability)
    assert dispatch.here() == ("gpu", "the default backend is Some GPU")
    assert dispatch.choose("op", None, fits) == dispatch.choose("op", "gpu", fits) == "gpu"


@pytest.mark.parametrize("capability", ["7.5", "8.9", "12.0", "gfx942"])  # a T4, an L4, a newer one, and AMD's
def test_another_gpu_runs_the_reference_and_says_why(machine, capability):
    machine(capability)
    why = f"Some GPU has compute capability {capability}, and the kernels are for 8.0 and 9.0"
    assert dispatch.here() == ("reference", why)
    assert dispatch.choose("op", None, fits) == "reference"
    with pytest.raises(ValueError, match=f"op: implementation='gpu' cannot run here: {why}"):
        dispatch.choose("op", "gpu", fits)


def test_a_machine_that_does_not_exist_cannot_be_compiled_for():
    with pytest.raises(ValueError, match="implementation='cuda' must be one of"), dispatch.compiling_for("cuda"):
        pass


def test_a_gpu_without_jax_triton_runs_the_reference_and_says_why(machine):
    machine("9.0", with_jax_triton=False)
    name, why = dispatch.here()
    assert name == "reference" and "pip install 'kvjax[gpu]'" in why


def test_a_call_that_no_kernel_can_do_takes_the_reference_unless_one_was_asked_for(machine):
    machine("9.0")
    assert dispatch.choose("op", None, lambda name: "too wide") == "reference"
    with pytest.raises(ValueError, match="op: implementation='gpu' cannot do this call: too wide"):
        dispatch.choose("op", "gpu", lambda name: "too wide")


def test_an_implementation_that_does_not_exist_is_refused():
    score = jnp.zeros((1, 1, 4))
    with pytest.raises(ValueError, match="implementation='cuda' must be one of"):
        topk_slots(score, jnp.arange(4, dtype=jnp.int32)[None, None], 2, implementation="cuda")


def test_a_block_that_takes_too_much_shared_memory_is_refused(monkeypatch):
    kernel = types.SimpleNamespace(__name__="wide", arg_names=["x"])
    import triton

    compiled = types.SimpleNamespace(metadata=types.SimpleNamespace(shared=200_000), asm={"cubin": b""})
    monkeypatch.setattr(triton, "compile", lambda *_, **__: compiled)
    monkeypatch.setattr("triton.compiler.ASTSource", lambda **_: None)
    launch = triton_call.Launch(kernel, ("*fp32",), {}, (1,), 4, 2)
    assert triton_call.compile_launch(launch, 90).shared == 200_000
    with pytest.raises(ValueError, match="wide: a block takes 200000 bytes of shared memory, and sm_80 has 166912"):
        triton_call.compile_launch(launch, 80)


def test_a_mesh_without_the_axis_is_refused():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    with (
        pytest.raises(ValueError, match="heads='model': the mesh has no axis 'model'"),
        kvjax.spread_over(mesh, heads="model"),
    ):
        pass


SPREAD = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels.sharding import by_row_and_head, spread_over

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
k, q_pos, weights = np.arange(64.0).reshape(4, 2, 8), np.arange(4).reshape(4, 1, 1), np.arange(12.0).reshape(3, 4)
seen = []

def part(k, none, q_pos, weights):
    seen.append((k.shape, q_pos.shape, weights.shape))
    return jnp.cumsum(k, axis=2) + q_pos, weights[:, :, None] * k[:, 0, :1].T[..., None]

def run(k, q_pos, weights):
    return by_row_and_head(part, (k, None, q_pos, weights), ("bh", "bh", "bh", ".b"), ("bh", ".b"))

want = run(k, q_pos, weights)
put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
args = put(k, "data", "model"), put(q_pos, "data"), put(weights, None, "data")
with spread_over(mesh, rows="data", heads="model"):
    compiled = jax.jit(run).lower(*args).compile()
got = compiled(*args)
for a, b in zip(got, want):
    np.testing.assert_array_equal(a, b)
assert ((2, 1, 8), (2, 1, 1), (3, 2)) in seen, seen
assert got[0].sharding.shard_shape((4, 2, 8)) == (2, 1, 8)
assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all"))
print("each did its own")
"""


def test_devices_do_their_own_rows_and_heads_and_send_nothing():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SPREAD], env=env, capture_output=True, text=True)
    assert "each did its own" in done.stdout, done.stderr
