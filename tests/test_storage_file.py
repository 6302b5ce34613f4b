"""Damaged, malformed and hostile files: each is refused, and none changes the module that it was to fill."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tautorch import storage_file
from tautorch.convert import convert
from tautorch.nn import Int8Linear
from tautorch.storage import CheckpointError, load, save

from .test_storage import Net, assert_rejected, net


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def saved(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """A file with an int8 layer, taken apart: (header, document, data)."""
    torch.manual_seed(3)
    model = net()
    convert(model, {"head": Int8Linear.from_float})
    save(model, path)
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["tautorch"]), raw[8 + length :]


def write(
    path: Path, header: dict[str, Any], document: Any = None, data: bytes = b"", sign: bool = True
) -> None:
    """Puts a file together again; with `sign` its structure's checksum is right."""
    if document is not None:
        text = document if isinstance(document, str) else json.dumps(document)
        header["__metadata__"]["tautorch"] = text
        if sign:
            header["__metadata__"]["tautorch_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_every_truncation(path: Path) -> None:
    saved(path)
    raw = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 1]:
        path.write_bytes(raw[:size])
        assert_rejected(path, "truncated|malformed")
    path.write_bytes(raw + b"\0")
    assert_rejected(path, "1 bytes after its last tensor")


def test_every_flipped_byte_of_the_data_is_noticed(path: Path) -> None:
    _, _, data = saved(path)
    raw = bytearray(path.read_bytes())
    start = len(raw) - len(data)
    for position in range(start, len(raw), 37):
        raw[position] ^= 1
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match="checksum"):
            load(path, Net)
        raw[position] ^= 1
    path.write_bytes(raw)
    load(path, Net)


def test_flipped_bytes_of_the_header_never_pass(path: Path) -> None:
    _, _, data = saved(path)
    raw = bytearray(path.read_bytes())
    for position in range(0, len(raw) - len(data), 41):
        raw[position] ^= 0x15
        path.write_bytes(raw)
        with pytest.raises(CheckpointError):
            load(path, Net)
        raw[position] ^= 0x15


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"\xff" * 8 + b"{}", "cannot hold a header"),
        (struct.pack("<Q", 2) + b"{]", "not valid JSON"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not UTF-8"),
        (struct.pack("<Q", 2) + b"[]", "header must be an object"),
        (struct.pack("<Q", 2) + b"{}", "not written by tautorch"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "not valid JSON|malformed"),
        (b"PK\x03\x04" + b"\0" * 100, "truncated or no safetensors"),
    ],
)
def test_malformed_files(path: Path, raw: bytes, match: str) -> None:
    path.write_bytes(raw)
    assert_rejected(path, match)


def test_a_foreign_safetensors_file(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(net().state_dict(), path)
    assert_rejected(path, "not written by tautorch.save")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "I32"}, "checksum of 'gain'"),
        ({"dtype": "X9"}, "unknown dtype"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"shape": [5, 2]}, "checksum of 'gain'"),
        ({"shape": [11]}, "does not fit"),
        ({"shape": [10**30]}, "does not fit"),
        ({"shape": [-10]}, "whole numbers"),
        ({"shape": [True]}, "whole numbers"),
        ({"shape": "10"}, "whole numbers"),
        ({"data_offsets": [0, 10**18]}, "does not fit"),
        ({"data_offsets": [0]}, "whole numbers"),
        ({"data_offsets": [40, 80]}, "overlap or leave a gap"),
        ({"extra": 1}, "must have dtype, shape and data_offsets"),
    ],
)
def test_tampered_tensor_entries(path: Path, change: dict[str, Any], match: str) -> None:
    header, _, data = saved(path)
    if header["gain"]["data_offsets"] == [40, 80]:
        change = change | ({"data_offsets": [80, 120]} if "data_offsets" in change and "gap" in match else {})
    header["gain"] |= change
    write(path, header, data=data)
    assert_rejected(path, match)


@pytest.mark.parametrize(
    "name", ["gain2", "../../etc/passwd", "/etc/passwd", "__class__", "head..weight", ""]
)
def test_renamed_tensors(path: Path, name: str) -> None:
    header, document, data = saved(path)
    header[name] = header.pop("gain")
    write(path, header, data=data)
    assert_rejected(path, "tensors and their checksums differ")
    document["sha256"][name] = document["sha256"].pop("gain")
    write(path, header, document, data)
    assert_rejected(path, "lacks the tensor 'gain'")


def test_a_name_given_twice(path: Path) -> None:
    header, _, data = saved(path)
    text = json.dumps(header)
    entry = json.dumps({"gain": header["gain"]})[1:-1]
    assert text.count(entry) == 1
    raw = text.replace(entry, f"{entry}, {entry}").encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    assert_rejected(path, "a name occurs twice")


def test_a_changed_structure_fails_its_checksum(path: Path) -> None:
    header, document, data = saved(path)
    document["modules"]["head"]["config"]["activation"] = "relu"
    write(path, header, document, data, sign=False)
    assert_rejected(path, "checksum of its structure")


def change(*keys: str, to: Any) -> Callable[[Any], None]:
    def apply(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        if to is None:
            del document[keys[-1]]
        else:
            document[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("tamper", "match"),
    [
        (change("format", to=99), "is of format 99"),
        (change("modules", to=None), "must have the object 'modules'"),
        (change("modules", to=[]), "must have the object 'modules'"),
        (change("aliases", to={"gain": "offset"}), "tied to 'offset'"),
        (change("aliases", to={"x": "gain"}), "'x', which the architecture lacks"),
        (change("aliases", to={"x": 3}), "tied to 3"),
        (change("sha256", "gain", to="00"), "checksum of 'gain'"),
        (change("sha256", "gain", to=[1]), "has no checksum"),
        (change("memory_format", to={"head.weight": "rainbow"}), "memory format"),
        (change("memory_format", to={"head.weight": [1]}), "memory format"),
        (change("memory_format", to={"gain": "channels_last"}), "memory format"),
        (change("modules", "head", to=None), "must describe the module 'head'"),
        (change("modules", "head", to="Linear"), "must describe the module 'head'"),
        (change("modules", "head", "class", to="os.system"), "unknown class 'os.system'"),
        (change("modules", "head", "class", to="torch.nn.Module"), "unknown class"),
        (change("modules", "head", "class", to=["torch.nn.Linear"]), "unknown class"),
        (change("modules", "head", "class", to="torch.nn.Linear"), "other arguments than"),
        (change("modules", "head", "class", to="code"), "needs a None at 'head'"),
        (change("modules", "head", "config", to=None), "a configuration"),
        (change("modules", "head", "config", "in_features", to=10**12), "beyond 32 bits"),
        (change("modules", "head", "config", "out_features", to=10**12), "beyond 32 bits"),
        (change("modules", "head", "config", "out_features", to=10**30), "beyond 32 bits"),
        (change("modules", "head", "config", "out_features", to=-1), "cannot build"),
        (change("modules", "head", "config", "out_features", to="10"), "cannot build"),
        (change("modules", "head", "config", "activation", to="__import__('os')"), "cannot build"),
        (change("modules", "head", "config", "no_such", to=1), "cannot build"),
        (change("modules", "head", "children", to=["weight"]), "the children"),
        (change("modules", "head", "children", to=None), "must list the children"),
        (change("modules", "head", "children", to=["a.b"]), "must list the children"),
        (change("modules", "", "children", to=["features"]), "the children"),
        (
            change("modules", "", "class", to="torch.nn.Identity"),
            "other arguments|is of a single|a configuration",
        ),
        (change("modules", "features", "children", to=["0", "1"]), "no child of any"),
        (change("modules", "features", "children", to=["0", "1", "2", "3"]), "must describe the module"),
        (change("modules", "features", "children", to=["0", "1", "1"]), "apart|twice"),
        (change("modules", "features.0", "config", "out_channels", to=2**40), "beyond 32 bits"),
        (change("modules", "features.1", "config", "num_features", to=10**13), "beyond 32 bits"),
        (change("modules", "features.0", "config", "out_channels", to=2**30), "in shape"),
        (change("modules", "head", "config", "out_features", to=2**30), "in shape"),
        (change("modules", "features.1", "config", "eps", to={"a": 1}), "cannot build|does not fit|is bad"),
        (change("modules", "features.2", to={"same_as": "nowhere"}), "is the same as 'nowhere'"),
        (change("modules", "features.2", to={"same_as": ["features.0"]}), "is the same as"),
        (change("modules", "ghost", to={"same_as": ""}), "no child of any"),
    ],
)
def test_hostile_structures_with_the_right_checksum(
    path: Path, tamper: Callable[[Any], None], match: str
) -> None:
    header, document, data = saved(path)
    tamper(document)
    write(path, header, document, data)
    assert_rejected(path, match)


def test_endless_nesting(path: Path) -> None:
    header, document, data = saved(path)
    name = "features"
    document["modules"]["features"]["children"] = ["0"]
    for _ in range(3000):
        name += ".0"
        document["modules"][name] = {"class": "torch.nn.Sequential", "config": {}, "children": ["0"]}
    write(path, header, document, data)
    assert_rejected(path, "nested too deeply")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("head.weight_scale", float("nan"), "non-finite values in 'head.weight_scale'"),
        ("head.weight_scale", float("inf"), "non-finite values in 'head.weight_scale'"),
        ("head.bias", float("-inf"), "non-finite values in 'head.bias'"),
    ],
)
def test_non_finite_values_of_packed_layers(path: Path, name: str, value: float, match: str) -> None:
    header, document, data = saved(path)
    start, end = header[name]["data_offsets"]
    values = torch.frombuffer(bytearray(data[start:end]), dtype=torch.float32).clone()
    values[3] = value
    document["sha256"][name] = storage_file.digest(values)
    write(path, header, document, data[:start] + values.numpy().tobytes() + data[end:])
    assert_rejected(path, match)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("x_scale", 0.0, "not positive"),
        ("x_scale", -1.0, "not positive"),
        ("x_zero_point", 128, "outside"),
        ("x_zero_point", -(2**31), "outside"),
    ],
)
def test_static_scales_are_checked(path: Path, name: str, value: float, match: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    convert(model, {"0": lambda la: Int8Linear.from_float(la, quant="static", x_scale=0.1, x_zero_point=3)})
    model[0]._buffers[name].fill_(value)
    save(model, path)
    with pytest.raises(CheckpointError, match=match):
        load(path, lambda: nn.Sequential(nn.Linear(4, 4)))
