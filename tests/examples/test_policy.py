"""``examples/c/policy.c``: a saved policy acts as in Python, here and as aarch64 code under qemu-user."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.native.building import EMULATOR, PREFIX, ROOT, build_aarch64, library, run
from torch import nn

import tautorch as tt

SOURCE = ROOT / "examples" / "c" / "policy.c"
CPUS = {"cortex-a72": "neon", "neoverse-n1": "neon_dotprod", "max": "neon_i8mm"}  # and what they take unasked
EMULATED = (EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu")
FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{ROOT / 'include'}")
X = 2 * torch.randn(9, 17, generator=torch.Generator().manual_seed(3))


def compiled(compiler: str, library: Path, folder: Path, *flags: str) -> Path:
    program = folder / "policy"
    run(compiler, *FLAGS, *flags, SOURCE, library, "-lstdc++", "-lpthread", "-lm", "-o", program)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example over the static library, its own code under sanitizers."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler; apt-get install gcc")
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return compiled("cc", library("libtautorch.a"), tmp_path_factory.mktemp("policy"), *sanitizers)


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which(EMULATOR):
        pytest.skip(f"{EMULATOR} is not installed; apt-get install qemu-user")
    return compiled(
        f"{PREFIX}gcc",
        build_aarch64("tautorch_static") / "libtautorch.a",
        tmp_path_factory.mktemp("policy-aarch64"),
        "-static",
    )


def integers() -> nn.Sequential:
    """Every product of integers, relu between them: nothing depends on the kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(17, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 70), nn.Dropout(), nn.ReLU()),
        nn.Linear(70, 64), nn.ReLU(), nn.Linear(64, 6),
    ).eval()  # fmt: skip
    mask = tt.prune.make_mask(model[3].weight, "4x1", 0.6)
    plan: dict[str, Callable[[Any], nn.Module]] = {
        "0": tt.nn.Int8Linear.from_float,
        "2.0": lambda m: tt.nn.Int8Linear.from_float(
            m, quant="static", x_scale=0.02, x_zero_point=-128, activation="relu"
        ),
        "3": lambda m: tt.nn.SparseLinear.from_float(m, pattern="4x1", mask=mask),
        # Of all layers the one with the most tensors.
        "5": lambda m: tt.nn.LowRankLinear.from_float(
            m, rank=4, weight_dtype=torch.int8, quant="static", x_scale=0.01, x_zero_point=-100
        ),
    }
    return tt.convert(model, plan)


def floats() -> nn.Sequential:
    """The layers and activations whose sums and functions round by kernel and library."""
    torch.manual_seed(1)
    sizes = (17, 40, 33, 48, 52, 30, 6)
    between = (nn.Tanh(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Identity())
    layers: list[nn.Module] = []
    for i, (k, n) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(k, n, bias=i != 2), *between[i : i + 1]]
    model = nn.Sequential(*layers).eval()
    mask = tt.prune.make_mask(model[4].weight, "unstructured", 0.5)
    plan: dict[str, Callable[[Any], nn.Module]] = {
        "2": lambda m: tt.nn.LowRankLinear.from_float(m, rank=9, activation="silu"),
        "4": lambda m: tt.nn.SparseLinear.from_float(
            m, pattern="unstructured", mask=mask, weight_dtype=torch.float32
        ),
        "6": lambda m: tt.nn.Int8Linear.from_float(m, quant="weight_only", activation="gelu"),
    }
    return tt.convert(model, plan)


def names() -> nn.Sequential:
    """Names that JSON escapes, a module that is there twice, and one weight in two layers."""
    torch.manual_seed(2)
    square, relu = nn.Linear(17, 17), nn.ReLU()
    twin = nn.Linear(17, 17)
    model = nn.Sequential()
    for name, module in (
        ('a "b" \\ /\t', nn.Linear(17, 17)), ("é", relu), ("策略", square), ("relu", relu), ("🤖", square),
        ("\x7f", relu), ("twin", twin), ("end", nn.Linear(17, 6)),
    ):  # fmt: skip
        model.add_module(name, module)
    twin.weight = square.weight
    return model.eval()


def actions(kernel: str, *command: str | Path) -> np.ndarray:
    """What the program prints for X; `kernel` is what must run."""
    text = "\n".join(" ".join(f"{v:.9g}" for v in row) for row in X.tolist())
    done = subprocess.run([str(w) for w in command], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"kernel {kernel}," in done.stderr
    return np.array([[float(v) for v in line.split()] for line in done.stdout.splitlines()], np.float32)


def expected(model: nn.Module) -> np.ndarray:
    with torch.inference_mode():
        return model(X).numpy()


def agree(
    model: nn.Module, folder: Path, kernel: str, command: tuple[str | Path, ...], *options: str
) -> None:
    """Bit for bit where every sum is one of integers, else to a few float roundings."""
    path = folder / "policy.safetensors"
    tt.save(model, path)
    got, y = actions(kernel, *command, path, *options), expected(model)
    if any(isinstance(m, nn.Linear) for m in model.modules()):
        np.testing.assert_allclose(got, y, rtol=0, atol=1e-5 * float(np.abs(y).max()))
    else:
        np.testing.assert_array_equal(got, y)


@pytest.mark.parametrize("policy", [integers, floats, names])
def test_here(program: Path, policy: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = policy()
    kernels = [name for name, runs in tt._C.isas().items() if runs]
    agree(model, tmp_path, kernels[0], (program,))
    agree(model, tmp_path, kernels[0], (program,), "--threads", "2", "--repeat", "3")
    for name in kernels:
        agree(model, tmp_path, name, (program,), "--kernel", name)


@pytest.mark.parametrize("policy", [integers, floats])
@pytest.mark.parametrize("cpu", CPUS)
def test_emulated(aarch64: Path, cpu: str, policy: Callable[[], nn.Module], tmp_path: Path) -> None:
    agree(policy(), tmp_path, CPUS[cpu], (*EMULATED, cpu, aarch64))


def refused(program: Path, path: Path, *options: str, text: str = "") -> str:
    done = subprocess.run(
        [program, path, *options], input=text, capture_output=True, text=True, check=False,
        env={"ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == "" and "Sanitizer" not in done.stderr, done.stderr
    return done.stderr


def test_damaged_files(program: Path, tmp_path: Path) -> None:
    """Truncation anywhere, and headers that lie: one line each, no step out of bounds."""
    path, bad = tmp_path / "policy.safetensors", tmp_path / "bad.safetensors"
    tt.save(integers(), path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def lie(change: Callable[[dict[str, Any]], None], message: str) -> None:
        changed = json.loads(json.dumps(header))
        change(changed)
        text = json.dumps(changed).encode()
        bad.write_bytes(struct.pack("<Q", len(text)) + text + body)
        assert message in refused(program, bad)

    for cut in (0, 7, 8, 9, 8 + length // 2, 8 + length, len(whole) - 1):
        bad.write_bytes(whole[:cut])
        assert "policy: " in refused(program, bad)
    for n in (len(whole) - 7, 2**63, 2**64 - 1):
        bad.write_bytes(struct.pack("<Q", n) + whole[8:])
        assert "longer than the file" in refused(program, bad)
    strings = (
        *(b"\\x", b"\\u12", b"\\u12g4", b"\\u0000", b"\\ud800", b"\\ud800\\u0041", b"\\ud800a\\u0041"),
        *(b"\\udc00", b"\n"),
    )
    quoted = [b'{"a' + string + b'":1}' for string in strings] + [b'{"\\', b'{"\\u', b'{"\\ud8ff\\u']
    twice = b'{"b":[{"a":1,"c":2,"\\u0061":3}]}'
    for junk in (b"[" * 4000, b"{}" * 3, b'{"a":1,}', b"\0" * 50, b'"x"', twice, *quoted):
        bad.write_bytes(struct.pack("<Q", len(junk)) + junk)
        assert "no JSON object" in refused(program, bad)
    lie(lambda h: h.pop("__metadata__"), "not written by tautorch.save")
    lie(lambda h: h.pop("0.weight"), "0.weight: not in the file")
    lie(lambda h: h["0.weight"].update(data_offsets=[0, 64 * 17 - 1]), "0.weight: damaged")
    lie(lambda h: h["0.weight"].update(data_offsets=[len(body), len(body) + 64 * 17]), "0.weight: damaged")
    lie(lambda h: h["0.weight"].update(data_offsets=[-1, 64 * 17 - 1]), "0.weight: damaged")
    lie(lambda h: h["0.weight"].update(data_offsets=[*h["0.weight"]["data_offsets"], 0]), "0.weight: damaged")
    lie(lambda h: h["0.weight"].update(shape=[2**40, 2**40]), "0.weight: damaged")
    lie(lambda h: h["0.weight"].update(dtype="F999"), "0.weight: damaged")
    lie(lambda h: h["0.bias"].update(dtype="I32"), "0.bias: expected 64 values of F32")
    lie(lambda h: h["3.col_indices"].update(data_offsets=h["3.crow_indices"]["data_offsets"]), "damaged")
    document = json.loads(header["__metadata__"]["tautorch"])

    text = json.dumps({**document, "format": 2})
    lie(lambda h: h["__metadata__"].update(tautorch=text), "of another format than 1")

    def structure(change: Callable[[dict[str, Any]], None], message: str) -> None:
        modules = json.loads(json.dumps(document["modules"]))
        change(modules)
        text = json.dumps({**document, "modules": modules})
        lie(lambda h: h["__metadata__"].update(tautorch=text), message)

    structure(lambda m: m["0"]["config"].update(in_features=18), "expected 1152 values of I8")
    structure(lambda m: m["0"]["config"].update(out_features=2**60), "fit neither")
    structure(lambda m: m["2.0"]["config"].update(in_features=63), "fit neither")
    structure(lambda m: m["0"]["config"].update(activation="swish"), "unknown activation")
    structure(lambda m: m["1"].update({"class": "torch.nn.LSTM"}), "does not run torch.nn.LSTM")
    structure(lambda m: m["2"].update(children=["9"]), "is not in the file")
    structure(lambda m: m[""].update(children=[""]), "is not in the file, or too deep")
    structure(lambda m: m.update({"1": {"same_as": "1"}}), "is not in the file, or too deep")
    structure(lambda m: m.update({"1": {"same_as": "x" * 300}}), "a name is too long")
    structure(lambda m: m["2"].update(children=["x" * 300]), "a name is too long")
    tree = {
        ".".join("a" * i): {"class": "torch.nn.Sequential", "children": ["a"] * 40 if i < 14 else []}
        for i in range(15)
    }
    structure(lambda m: m.update(tree), "more than 1024 modules")
    structure(lambda m: m["3"]["config"].update(pattern="16x16"), "4x1 and unstructured")
    structure(lambda m: m["5"]["config"].update(rank=7), "expected 448 values of I8")


def test_lists_that_lie(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    model = integers()
    tt.save(model, path)
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    at = 8 + length + json.loads(raw[8 : 8 + length])["3.col_indices"]["data_offsets"][0]
    for index, message in ((-1, "index is out of range"), (70, "inputs of each group must ascend")):
        raw[at : at + 2] = struct.pack("<h", index)
        path.write_bytes(raw)
        assert message in refused(program, path)


def test_bad_arguments(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    tt.save(integers(), path)
    assert "usage" in refused(program, path, "--kernel")
    assert "usage" in refused(program, path, "--colour", "red")
    assert "unknown kernel 'sse9'" in refused(program, path, "--kernel", "sse9")
    assert "n must be in [1, 1024], got 0" in refused(program, path, "--threads", "0")
    assert "cannot be opened" in refused(program, tmp_path / "none")
    assert "17 for each observation" in refused(program, path, text="1 2 3")
    assert "17 for each observation" in refused(program, path, text="one " * 17)
