"""Check the grammar of mesh sizes, and the device layout against jax's mesh."""

import math

import hypothesis.strategies as st
import jax
import pytest
from hypothesis import given

from lwm.core.errors import ConfigError
from lwm.core.mesh import AXES, MeshShape, make_mesh, parse_mesh

SHORT = {"data": "dp", "fsdp": "fsdp", "tensor": "tp", "sequence": "sp"}
counts = st.integers(1, 64)


def by_name(shape: MeshShape) -> dict[str, int]:
    return dict(zip(shape.axes, shape.sizes, strict=True))


@given(st.tuples(counts, counts, counts, counts), st.booleans(), st.sampled_from(["", " ", "  "]))
def test_plain_counts_are_data_fsdp_tensor_sequence(
    sizes: tuple[int, ...], split: bool, space: str
) -> None:
    shape = parse_mesh(space + "!" * split + f",{space}".join(map(str, sizes)) + space)
    assert by_name(shape) == dict(zip(("data", "fsdp", "tensor", "sequence"), sizes, strict=True))
    assert shape.split_physical_axes == split
    assert parse_mesh(str(shape)) == shape


@given(
    st.permutations(AXES), st.tuples(counts, counts, counts, counts), st.booleans(), st.booleans()
)
def test_named_counts_come_in_any_order_and_keep_it(
    order: list[str], sizes: tuple[int, ...], long: bool, split: bool
) -> None:
    names = order if long else [SHORT[axis] for axis in order]
    pairs = zip(names, sizes, strict=True)
    shape = parse_mesh("!" * split + ",".join(f"{name}:{size}" for name, size in pairs))
    assert shape.axes == tuple(order)
    assert by_name(shape) == dict(zip(order, sizes, strict=True))
    assert shape.split_physical_axes == split


@pytest.mark.parametrize(
    "text",
    [
        "", "1", "1,1,1", "1,1,1,1,1", "1,1,1,x", "1,1,1,1.5", "dp:1,fsdp:1,tp:1", "1,fsdp:1,1,1",
        "dp:1,dp:1,tp:1,sp:1", "dp:1,fsdp:1,tp:1,ring:1", "0,1,1,1", "-2,1,1,1", "-1,-1,1,1",
        "!!1,1,1,1", "1,1,1,!1",
    ],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_mesh(text)


@given(st.integers(0, 3), st.tuples(*[st.integers(1, 4)] * 4), st.integers(1, 8))
def test_the_open_size_takes_the_devices_left_over(
    place: int, sizes: tuple[int, ...], rest: int
) -> None:
    wanted = (*sizes[:place], rest, *sizes[place + 1 :])
    opened = (*sizes[:place], -1, *sizes[place + 1 :])
    assert MeshShape(sizes=opened).resolve(math.prod(wanted)).sizes == wanted


def test_fewer_devices_than_present_may_be_asked_for() -> None:
    assert MeshShape(sizes=(1, 1, 1, 2)).resolve(4).sizes == (1, 1, 1, 2)


@pytest.mark.parametrize(
    ("text", "devices", "numbers"),
    [("1,1,2,4", 4, ("8", "4")), ("1,-1,3,1", 4, ("3", "4")), ("2,-1,4,1", 6, ("8", "6"))],
)
def test_a_mesh_that_does_not_fit_is_refused_with_both_numbers(
    text: str, devices: int, numbers: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_mesh(text).resolve(devices)
    assert all(number in str(error.value) for number in numbers)


def test_the_mesh_lays_out_the_first_devices_slowest_axis_first() -> None:
    devices = jax.devices()
    mesh = make_mesh("1,2,1,2")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1, "sequence": 2}
    assert mesh.devices.flatten().tolist() == devices
    named = make_mesh("sp:2,tp:2,dp:1,fsdp:1")
    assert named.axis_names == ("sequence", "tensor", "data", "fsdp")
    assert named.devices[:, 0, 0, 0].tolist() == [devices[0], devices[2]]
    assert make_mesh("1,-1,1,1").shape["fsdp"] == 4
    assert make_mesh("1,1,1,2").devices.flatten().tolist() == devices[:2]


def test_more_devices_than_present_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"8 devices but 4"):
        make_mesh("1,1,1,8")
