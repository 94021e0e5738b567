"""The oracle is the onnx package: what its parser finds, the walker must find or refuse."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress

import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper

from wanx.errors import CorruptInputError
from wanx.files.onnx_wire import _CHILDREN, ExternalData, external_data, renamed_locations


def external(name: str, location: str, **entries: int | str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def inline(name: str) -> TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, [2], [1.0, 2.0])


def every_place() -> onnx.ModelProto:
    """A model with an external tensor in every place of the schema that can hold one."""
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=external("c", "weights/nested", offset=8))],
        "inner",
        [],
        [],
        [inline("i"), external("b", "weights/branch", length=8)],
    )
    attributes = onnx.NodeProto(op_type="Odd", domain="wanx", output=["o"])
    attributes.attribute.append(helper.make_attribute("g", inner))
    attributes.attribute.add(name="gs", type=onnx.AttributeProto.GRAPHS).graphs.append(inner)
    listed = attributes.attribute.add(name="ts", type=onnx.AttributeProto.TENSORS)
    listed.tensors.extend([external("t0", "weights/list0"), external("t1", "weights/list1")])
    sparse = attributes.attribute.add(name="s", type=onnx.AttributeProto.SPARSE_TENSOR)
    sparse.sparse_tensor.values.CopyFrom(external("v", "weights/sparse_values"))
    sparse.sparse_tensor.indices.CopyFrom(external("x", "weights/sparse_indices"))
    many = attributes.attribute.add(name="ss", type=onnx.AttributeProto.SPARSE_TENSORS)
    many.sparse_tensors.append(sparse.sparse_tensor)
    graph = helper.make_graph(
        [attributes],
        "outer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [2])],
        [inline("w"), external("e", "weights/dit.safetensors", offset=72, length=8)],
    )
    graph.sparse_initializer.add().values.CopyFrom(external("sv", "weights/sparse_init"))
    function = helper.make_function(
        "wanx", "F", ["a"], ["y"],
        [helper.make_node("Constant", [], ["y"], value=external("f", "weights/function"))],
        [helper.make_opsetid("", 22)],
        attribute_protos=[helper.make_attribute("d", external("d", "weights/default"))],
    )  # fmt: skip
    model = helper.make_model(graph, functions=[function], producer_name="wanx")
    model.metadata_props.add(key="location", value="not/external/data")
    training = model.training_info.add()
    training.initialization.initializer.append(external("ti", "weights/training_init"))
    training.algorithm.initializer.append(external("ta", "weights/training_step"))
    return model


def oracle(message: Message) -> Iterator[ExternalData]:
    """Every TensorProto below ``message``, found by reflection."""
    if isinstance(message, TensorProto):
        entries = {entry.key: entry.value for entry in message.external_data}
        if entries or message.data_location == TensorProto.EXTERNAL:
            length = entries.get("length")
            yield ExternalData(
                entries.get("location", ""),
                int(entries.get("offset", "0")),
                None if length is None else int(length),
            )
        return
    for field, value in message.ListFields():
        if field.message_type:
            for child in [value] if isinstance(value, Message) else value:
                yield from oracle(child)


def test_finds_what_onnx_finds_in_every_place() -> None:
    model = every_place()
    found = sorted(external_data(model.SerializeToString()), key=str)
    assert found == sorted(oracle(model), key=str)
    assert len({data.location for data in found}) == 12
    assert ExternalData("weights/dit.safetensors", 72, 8) in found
    assert ExternalData("weights/nested", 8, None) in found


def test_the_table_covers_the_schema() -> None:
    """A newer onnx that puts tensors in new places must extend the walker."""

    def reaches_tensor(kind: str, seen: frozenset[str] = frozenset()) -> bool:
        fields = getattr(onnx, kind).DESCRIPTOR.fields
        names = {field.message_type.name for field in fields if field.message_type} - seen
        return "TensorProto" in names or any(
            reaches_tensor(name, seen | {kind}) for name in names if hasattr(onnx, name)
        )

    for kind, children in _CHILDREN.items():
        descriptor = getattr(
            onnx, {"Training": "TrainingInfo"}.get(kind, kind) + "Proto"
        ).DESCRIPTOR
        expected = {
            field.number: field.message_type.name.removesuffix("Proto").replace("Info", "")
            for field in descriptor.fields
            if field.message_type
            and (field.message_type.name == "TensorProto" or hasattr(onnx, field.message_type.name))
            and (
                field.message_type.name == "TensorProto" or reaches_tensor(field.message_type.name)
            )
        }
        assert children == expected, kind


def test_a_model_without_external_data_has_none() -> None:
    graph = helper.make_graph([], "g", [], [], [inline("w")])
    assert list(external_data(helper.make_model(graph).SerializeToString())) == []
    assert list(external_data(b"")) == []


def test_large_inline_tensors_are_skipped() -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[1 << 20])
    tensor.raw_data = random.Random(0).randbytes(1 << 20)
    graph = helper.make_graph([], "g", [], [], [tensor, external("e", "weights/x")])
    found = external_data(helper.make_model(graph).SerializeToString())
    assert [data.location for data in found] == ["weights/x"]


def test_a_second_graph_merged_into_the_first_is_seen() -> None:
    """Protobuf merges a message that occurs twice; both halves reach ONNX Runtime."""
    extra = onnx.ModelProto()
    extra.graph.initializer.append(external("evil", "/etc/passwd"))
    data = every_place().SerializeToString() + extra.SerializeToString()
    assert "/etc/passwd" in {found.location for found in oracle(onnx.load_from_string(data))}
    assert "/etc/passwd" in {found.location for found in external_data(data)}


def field(number: int, payload: bytes) -> bytes:
    assert len(payload) < 128
    return bytes([number << 3 | 2, len(payload)]) + payload


def test_a_tensor_split_over_two_occurrences_does_not_hide_its_location() -> None:
    good = external("t", "weights/dit.safetensors").SerializeToString()
    evil = TensorProto()
    evil.external_data.add(key="location", value="../../secret")
    attribute = field(1, b"value") + field(5, good) + field(5, evil.SerializeToString())
    data = field(7, field(1, field(5, attribute)))
    merged = onnx.load_from_string(data).graph.node[0].attribute[0].t
    assert merged.external_data[-1].value == "../../secret"
    assert "../../secret" in {found.location for found in external_data(data)}


def in_model(tensor: TensorProto | bytes) -> bytes:
    payload = tensor if isinstance(tensor, bytes) else tensor.SerializeToString()
    return field(7, field(5, payload))


def two_locations() -> TensorProto:
    tensor = external("t", "weights/a")
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = onnx.GraphProto.FromString(data).SerializeToString()
        node = onnx.NodeProto(op_type="If")
        node.attribute.add(name="g").g.MergeFromString(data)
        data = onnx.GraphProto(node=[node]).SerializeToString()
    return onnx.ModelProto(graph=onnx.GraphProto.FromString(data)).SerializeToString()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (in_model(two_locations()), "two values for 'location'"),
        (in_model(TensorProto(data_location=TensorProto.EXTERNAL)), "names no file"),
        (in_model(external("t", "weights/a", offset=-1)), "'-1' is not an offset"),
        (in_model(external("t", "weights/a", length="9" * 40)), "is not an offset"),
        (in_model(external("t", "weights/a", length="0x10")), "'0x10' is not an offset"),
        (in_model(external("t", "weights/a", offset="\u0661")), "is not an offset"),
        (in_model(field(13, field(1, b"location") + field(2, b"\xff"))), "not UTF-8"),
        (b"\x3a\x7f\x00", "ends in the middle of a field"),
        (b"\x3a", "ends in the middle of a number"),
        (b"\x08" + b"\xff" * 10, "longer than 64 bits"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x02\x00", "field number 0"),
        (b"\xba\x80\x80\x80\x20\x00", "field number"),
        (b"PK\x03\x04 this is a zip file", "graph damaged"),
    ],
)
def test_refuses(data: bytes, found: str) -> None:
    with pytest.raises(CorruptInputError, match="graph damaged") as caught:
        list(external_data(data))
    assert found in str(caught.value)


def test_nesting_is_capped() -> None:
    assert list(external_data(nested(20))) == []
    with pytest.raises(CorruptInputError, match="nested too deeply"):
        list(external_data(field_chain(40)))


def field_chain(levels: int) -> bytes:
    """Graph, node, attribute, graph, … built by hand: onnx itself refuses this depth."""
    data = b""
    for _ in range(levels):
        for number in (6, 5, 1):
            data = bytes([number << 3 | 2]) + varint(len(data)) + data
    data = bytes([7 << 3 | 2]) + varint(len(data)) + data
    with pytest.raises(DecodeError):
        onnx.load_from_string(data)
    return data


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def test_every_truncation_is_damage_or_a_shorter_model() -> None:
    data = every_place().SerializeToString()
    refused = 0
    for size in range(len(data)):
        try:
            list(external_data(data[:size]))
        except CorruptInputError:
            refused += 1
        else:
            onnx.load_from_string(data[:size])
    assert refused > 0.9 * len(data)


def test_nothing_that_onnx_reads_from_damaged_bytes_stays_hidden() -> None:
    data = every_place().SerializeToString()
    dice = random.Random(1)
    compared = 0
    for _ in range(4000):
        damaged = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 5))):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        try:
            seen = {found.location for found in external_data(bytes(damaged))}
        except CorruptInputError:
            continue
        try:
            model = onnx.load_from_string(bytes(damaged))
        except DecodeError:
            continue
        compared += 1
        opened = {e.value for t in tensors(model) for e in t.external_data if e.key == "location"}
        assert opened <= seen
    assert compared > 500


def tensors(message: Message) -> Iterator[TensorProto]:
    if isinstance(message, TensorProto):
        yield message
    for descriptor, value in message.ListFields():
        if descriptor.message_type:
            for child in [value] if isinstance(value, Message) else value:
                yield from tensors(child)


def test_locations_are_renamed_everywhere() -> None:
    model = every_place()
    renamed = renamed_locations(model.SerializeToString(), lambda old: f"blobs/{old}é" * 20)
    expected = [
        ExternalData(f"blobs/{entry.location}é" * 20, entry.offset, entry.length)
        for entry in external_data(model.SerializeToString())
    ]
    assert list(external_data(renamed)) == expected
    parsed = onnx.ModelProto.FromString(renamed)
    back = renamed_locations(
        renamed, lambda new: new[: len(new) // 20].removeprefix("blobs/").removesuffix("é")
    )
    assert onnx.ModelProto.FromString(back) == model
    assert parsed != model


def test_what_is_not_a_model_is_not_renamed() -> None:
    data = every_place().SerializeToString()
    for cut in range(1, len(data), 7):
        with suppress(CorruptInputError):
            renamed_locations(data[:cut], str.upper)
