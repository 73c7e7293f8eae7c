"""What lies where on a mesh of eight devices, which the layout alone needs: no device computes anything here."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from tests.tiny import CONFIG, random_params
from train import mesh as meshes


def devices(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), meshes.AXES, axis_types=(AxisType.Auto,) * 3)


def spec(sharding):
    return tuple(sharding.spec)


def test_data_takes_the_devices_that_are_left():
    assert meshes.make_mesh().shape == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "sizes, said",
    [
        (dict(data=3, fsdp=2), r"data=3 times fsdp=2 times tensor=1 is 6, and there are \d+ devices\. Leave data out"),
        (dict(fsdp=5, tensor=7), r"fsdp=5 times tensor=7 is 35, which does not divide the \d+ devices"),
        (dict(tensor=0), r"tensor=0 must be at least 1"),
    ],
)
def test_a_mesh_of_another_number_of_devices_is_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        meshes.make_mesh(**sizes)


def test_weights_are_split_by_heads_and_channels_over_tensor_and_along_the_other_axis_over_fsdp():
    layout = meshes.shardings(random_params(), devices(2, 2, 2))
    block = layout.blocks[1]
    assert {spec(one) for one in (block.wq, block.wk, block.wv, block.w_gate, block.w_up)} == {("tensor", "fsdp")}
    assert {spec(one) for one in (block.wo, block.w_down)} == {("fsdp", "tensor")}
    assert {spec(one) for one in (block.attention_norm, block.mlp_norm, layout.norm)} == {()}
    assert spec(layout.embed) == (None, "fsdp"), "61 words do not divide over 2 devices"


def test_a_layout_that_would_cut_a_kv_head_is_refused():
    with pytest.raises(ValueError, match=r"tensor=4 would cut heads: the model has 2 kv_heads"):
        meshes.shardings(random_params(), devices(1, 1, 4))


def test_heads_of_eviction_lie_whole_on_every_device_whatever_they_are_called():
    params = dataclasses.replace(
        random_params(dataclasses.replace(CONFIG, layers=1)), heads={"m": {"wq": np.ones((4, 4))}}
    )
    assert spec(meshes.shardings(params, devices(2, 2, 2)).heads["m"]["wq"]) == ()


def test_trained_arrays_are_spread_over_fsdp_along_their_longest_axis_that_it_divides():
    tree = {"w": np.zeros((3, 8, 4)), "odd": np.zeros((3, 5)), "count": np.zeros(())}
    got = jax.tree.map(spec, meshes.spread(tree, devices(1, 4, 1)), is_leaf=lambda one: isinstance(one, NamedSharding))
    assert got == {"w": (None, "fsdp"), "odd": (), "count": ()}


def test_rows_of_a_batch_are_spread_over_data_and_fsdp():
    assert meshes.batch_sharding(devices(2, 2, 2)).spec == PartitionSpec(("data", "fsdp"))


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"'lengths' has shape \(\).*axis 0 must divide over data=\d+ times fsdp=1"):
        meshes.global_batch(meshes.make_mesh(), {"lengths": np.int32(3)})


def test_only_part_of_what_joins_processes_is_refused():
    with pytest.raises(ValueError, match=r"count=2, index=None: give all three, or none"):
        meshes.start_processes("localhost:1234", 2)


@pytest.mark.parametrize(
    "processes, tensor, parts",
    [
        ([0, 0, 1, 1], 1, [(0, 2), (1, 2)]),
        ([0, 1, 1, 0], 1, [(0, 2), (1, 2)]),  # along a ring
        ([0, 1, 1, 0, 2, 3, 3, 2], 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_a_process_reads_its_devices_rows_scattered_or_shared(processes, tensor, parts):
    mesh = mesh_of(processes, tensor)
    assert [meshes.rows_of_process(mesh, process) for process in range(len(parts))] == parts


def test_rows_that_are_no_equal_parts_of_the_processes_are_refused():
    with pytest.raises(ValueError, match=r"the processes hold \[\(0, 1\), \(1, 2\)\], which are not equal parts"):
        meshes.rows_of_process(mesh_of([0, 0, 0, 1, 1, 1], 2), 0)


def mesh_of(processes, tensor):
    """What `rows_of_process` reads of a mesh whose devices, in order, are of these processes."""
    chips = np.array([SimpleNamespace(process_index=process) for process in processes])
    return SimpleNamespace(devices=chips, shape={"tensor": tensor}, size=len(chips))


def test_inside_over_weights_are_asked_for_whole_along_fsdp_and_rows_where_they_are():
    def program(block, x):
        return meshes.gathered(block), meshes.laid(x, meshes.ROWS)

    block, x = random_params().blocks[0], jax.ShapeDtypeStruct((8, 3), np.float32)
    with meshes.over(devices(2, 2, 2)):
        asked = {equation.params["sharding"].spec for equation in jax.make_jaxpr(program)(block, x).eqns}
    weights = {PartitionSpec(), PartitionSpec("tensor", None), PartitionSpec(None, "tensor")}
    assert asked == weights | {PartitionSpec(("data", "fsdp"))}
    again = jax.make_jaxpr(lambda *args: program(*args))  # jax has kept what it made of `program`
    assert not again(block, x).eqns, "nothing is asked for elsewhere"
