"""`save` and `load`: what comes back is what was saved, and a bad file changes nothing."""

from __future__ import annotations

import copy
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tautorch import storage_file, storage_structure
from tautorch.convert import convert
from tautorch.factorize.layers import FactorizedConv2d, FactorizedLinear
from tautorch.fuse import fuse
from tautorch.nn import Int8Linear
from tautorch.storage import CheckpointError, describe, load, save, size_report


class Net(nn.Module):
    """Convolution, norm, own parameter, non-persistent buffer, optional child: what architectures hold."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.shortcut: nn.Module | None = None
        self.head = nn.Linear(width * 4, 10)
        self.gain = nn.Parameter(torch.randn(10))
        self.register_buffer("offset", torch.ones(10), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1)) * self.gain + self.offset


def net() -> Net:
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def images() -> Tensor:
    return torch.randn(5, 3, 4, 4)


def assert_round_trip(model: nn.Module, skeleton: Any, x: Tensor, path: Path) -> nn.Module:
    expected = model(x)
    save(model, path)
    loaded = load(path, skeleton)
    assert torch.equal(loaded.eval()(x), expected)
    before, after = model.state_dict(), loaded.state_dict()
    assert sorted(after) == sorted(before)
    assert all(torch.equal(after[k], before[k]) and after[k].dtype == before[k].dtype for k in before)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    return loaded


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_unchanged_model(path: Path) -> None:
    assert_round_trip(net(), Net, images(), path)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


WRAPPERS = [compiled, nn.DataParallel, lambda model: compiled(nn.DataParallel(model))]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_of_a_wrapper_the_model_inside_is_saved_and_filled(wrap: Any, path: Path) -> None:
    model, x = net(), images()
    convert(model, {"head": Int8Linear.from_float})
    plain = path.with_name("plain.safetensors")
    save(model, plain)
    save(wrap(model), path)
    assert describe(path) == describe(plain)
    assert size_report(wrap(model)).file == size_report(model).file
    assert torch.equal(load(path, Net).eval()(x), model(x))
    skeleton = Net()
    wrapped = wrap(skeleton)
    assert load(path, wrapped) is wrapped
    assert isinstance(skeleton.head, Int8Linear)
    assert torch.equal(wrapped.eval()(x), model(x))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_file_of_an_earlier_version_holds_the_wrapper(
    wrap: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net(), images()
    convert(model, {"head": Int8Linear.from_float})
    with monkeypatch.context() as patch:
        patch.setattr(storage_structure, "unwrapped", lambda model: model)
        save(wrap(model), path)
    loaded = load(path, wrap(Net()))
    assert torch.equal(loaded.eval()(x), model(x))


def test_a_model_wrapped_further_in_is_saved_with_its_wrapper(path: Path) -> None:
    model = nn.Sequential(compiled(nn.Linear(3, 4)), nn.ReLU()).eval()
    assert_round_trip(model, nn.Sequential(compiled(nn.Linear(3, 4)), nn.ReLU()), torch.randn(2, 3), path)


@pytest.mark.parametrize("encode", [None, "entropy"])
def test_a_name_as_long_as_the_file_system_takes(encode: Any, path: Path) -> None:
    if encode is not None:
        pytest.importorskip("constriction", reason="constriction is not installed")
    longest = path.with_name("m" * os.pathconf(path.parent, "PC_NAME_MAX"))
    save(nn.Linear(3, 4), longest, encode=encode)
    load(longest, lambda: nn.Linear(3, 4))
    assert list(path.parent.iterdir()) == [longest]


def test_a_module_is_filled_in_place(path: Path) -> None:
    model, skeleton = net(), Net()
    save(model, path)
    weight = skeleton.head.weight
    assert load(path, skeleton) is skeleton
    assert skeleton.head.weight is weight
    assert torch.equal(weight, model.head.weight)
    assert skeleton.training


def test_replaced_layers(path: Path) -> None:
    model = net()
    convert(model, {"head": Int8Linear.from_float}, images())
    loaded = assert_round_trip(model, Net, images(), path)
    assert isinstance(loaded.head, Int8Linear)


def test_fused_converted_and_fused_again(path: Path) -> None:
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 4), nn.Sigmoid()
    ).eval()
    skeleton = copy.deepcopy(model)
    fuse(model)
    convert(model, {"0": Int8Linear.from_float})
    fuse(model)
    loaded = assert_round_trip(model, skeleton, torch.randn(3, 8), path)
    assert loaded[0].activation == "gelu"
    assert type(loaded[1]) is nn.Identity and type(loaded[2]) is nn.Identity


def test_other_shapes_than_the_code_makes(path: Path) -> None:
    """Pruned channels: every layer they touch is narrower than in the skeleton."""
    model = Net(width=4).eval()
    loaded = assert_round_trip(model, Net, images(), path)
    assert loaded.features[0].out_channels == 4
    assert loaded.head.in_features == 16


def test_factorised_layers_some_converted(path: Path) -> None:
    model = net()
    model.features[0] = FactorizedConv2d(nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 6, 1))
    model.head = FactorizedLinear(nn.Linear(24, 5, bias=False), nn.Linear(5, 10))
    model.eval()
    loaded = assert_round_trip(model, Net, images(), path)
    assert type(loaded.head) is FactorizedLinear and loaded.head.rank == 5
    convert(model, {"head.up": Int8Linear.from_float})
    loaded = assert_round_trip(model, Net, images(), path)
    assert isinstance(loaded.head.up, Int8Linear)


def test_plain_sequential_in_place_of_a_layer(path: Path) -> None:
    model = net()
    model.head = nn.Sequential(nn.Linear(24, 5, bias=False), nn.Linear(5, 10)).eval()
    assert_round_trip(model, Net, images(), path)


def test_fewer_blocks_than_the_code_makes(path: Path) -> None:
    def deep() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)))

    model = nn.Sequential(*(deep()[i] for i in (0, 3))).eval()
    loaded = assert_round_trip(model, deep, torch.randn(2, 4), path)
    assert len(loaded) == 2


def test_half_precision_is_kept(path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).bfloat16().eval()
    convert(model, {"0": Int8Linear.from_float})
    x = torch.randn(2, 8).bfloat16()
    loaded = assert_round_trip(model, lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), x, path)
    assert loaded[1].weight.dtype == torch.bfloat16


def test_channels_last_is_kept(path: Path) -> None:
    model = net().to(memory_format=torch.channels_last)
    loaded = assert_round_trip(model, Net, images(), path)
    assert loaded.features[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not loaded.features[0].weight.is_contiguous()


@pytest.mark.parametrize("channels", [1, 3])
def test_strides_are_kept_where_the_layout_is_ambiguous(path: Path, channels: int) -> None:
    model = nn.Sequential(nn.Conv2d(channels, 8, 3))
    weight = model[0].weight
    strides = torch.empty(weight.shape, memory_format=torch.channels_last).stride()
    weight.data = torch.empty_strided(weight.shape, strides).copy_(weight.data)
    save(model, path)
    loaded = load(path, lambda: nn.Sequential(nn.Conv2d(channels, 8, 3)))
    assert loaded[0].weight.stride() == strides
    assert torch.equal(loaded[0].weight, weight)


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


@pytest.mark.parametrize("skeleton_tied", [True, False])
def test_tied_weights_are_stored_once_and_tied_again(path: Path, skeleton_tied: bool) -> None:
    x = torch.arange(10)
    loaded = assert_round_trip(Tied(), lambda: Tied(skeleton_tied), x, path)
    assert loaded.head.weight is loaded.embed.weight
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["embed.weight"]


def test_tied_weights_of_another_shape(path: Path) -> None:
    model = Tied()
    model.embed = nn.Embedding(7, 4)
    model.head = nn.Linear(4, 7, bias=False)
    model.head.weight = model.embed.weight
    loaded = assert_round_trip(model, Tied, torch.arange(7), path)
    assert loaded.head.weight is loaded.embed.weight


def test_views_that_overlap_are_stored_apart(path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    flat = torch.randn(6, 4)
    model[0].weight.data, model[1].weight.data = flat[:4], flat[2:]
    skeleton = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert_round_trip(model, skeleton, torch.randn(2, 4), path)


def test_a_module_used_twice(path: Path) -> None:
    def twice() -> nn.Module:
        block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        return nn.Sequential(block, nn.Tanh(), block)

    model = twice()
    convert(model, {"0.0": Int8Linear.from_float})
    loaded = assert_round_trip(model, twice, torch.randn(2, 4), path)
    assert loaded[0] is loaded[2]


def test_a_fresh_process_predicts_the_same(path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    convert(model, {"0": Int8Linear.from_float, "2": Int8Linear.from_float})
    x = torch.randn(7, 16)
    save(model, path)
    torch.save(x, path.with_name("x.pt"))
    code = (
        "import sys, torch; from torch import nn; from tautorch.storage import load;"
        "d = sys.argv[1]; x = torch.load(d + '/x.pt');"
        "arch = lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4));"
        "m = load(d + '/model.safetensors', arch);"
        "torch.save(m.eval()(x), d + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(path.parent)], check=True, timeout=120)
    assert torch.equal(torch.load(path.with_name("y.pt")), model(x))


def test_describe_and_info(path: Path) -> None:
    model = net()
    convert(model, {"head": Int8Linear.from_float})
    save(model, path, info={"accuracy": 0.98, "device": "a machine", "times": [1, 2.5]})
    found = describe(path)
    assert found["info"] == {"accuracy": 0.98, "device": "a machine", "times": [1, 2.5]}
    assert found["torch"] == torch.__version__
    assert found["modules"]["head"]["class"] == "tautorch.nn.Int8Linear"
    assert found["modules"][""]["type"].endswith("Net")
    assert found["tensors"]["head.weight"] == {"dtype": "torch.int8", "shape": [10, 24]}


def test_random_state_and_mode_are_kept(path: Path) -> None:
    model = net()
    convert(model, {"head": Int8Linear.from_float})
    save(model, path)
    skeleton = Net().eval()
    skeleton.features.train()
    state = torch.get_rng_state()
    loaded = load(path, skeleton)
    assert torch.equal(state, torch.get_rng_state())
    assert not loaded.training and not loaded.head.training and loaded.features[0].training


# --- what cannot be saved ---------------------------------------------------------------------------


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "info", "error", "match"),
    [
        (3, None, TypeError, "model must be an nn.Module, got int"),
        (nn.Linear(2, 2), [1], TypeError, "info must be a dict"),
        (nn.Linear(2, 2), {"a": object()}, ValueError, "must be JSON"),
        (nn.Linear(2, 2), {"a": float("nan")}, ValueError, "must be JSON"),
        (nn.Linear(2, 2), {1: "a", "1": "b"}, ValueError, "must be JSON.*a name occurs twice"),
        (Extra(2, 2), None, TypeError, "'_extra_state' must be a tensor, got dict"),
        (nn.Linear(2, 2, device="meta"), None, ValueError, "'weight' must be a dense tensor.*meta"),
        (nn.Linear(2, 2, dtype=torch.complex64), None, ValueError, "complex64"),
    ],
)
def test_what_cannot_be_saved(path: Path, model: Any, info: Any, error: type[Exception], match: str) -> None:
    path.write_bytes(b"what was there")
    with pytest.raises(error, match=f"save: .*{match}"):
        save(model, path, info=info)
    assert path.read_bytes() == b"what was there"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("encode", [None, "entropy"])
def test_a_document_that_could_not_be_read_back_is_not_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, encode: Any
) -> None:
    monkeypatch.setattr(storage_file, "MAX_HEADER", 5000)
    save(nn.Linear(2, 2), path, encode=encode)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="save: info and structure must be under 5000 bytes of JSON"):
        save(nn.Linear(2, 2), path, info={"a": "b" * 5000}, encode=encode)
    assert path.read_bytes() == before


@pytest.mark.parametrize("moment", ["save_file", "os.fsync", "os.replace"])
def test_a_failed_save_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    save(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    target = storage_file if moment == "save_file" else storage_file.os
    monkeypatch.setattr(target, moment.rpartition(".")[2], full)
    with pytest.raises(OSError, match="No space left"):
        save(nn.Linear(3, 3), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_bad_places(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="must be a file, got the device or pipe"):
        save(nn.Linear(2, 2), tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(IsADirectoryError, match="must be a file"):
        save(nn.Linear(2, 2), tmp_path)
    with pytest.raises(FileNotFoundError, match="make it first"):
        save(nn.Linear(2, 2), tmp_path / "none" / "m.safetensors")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors", lambda: nn.Linear(2, 2))


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("encode", [None, "entropy"])
def test_a_full_disk_is_an_oserror(path: Path, encode: Any) -> None:
    if encode is not None:
        pytest.importorskip("constriction")
    resource = pytest.importorskip("resource")
    save(nn.Linear(2, 2), path)
    before = path.read_bytes()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as if no more bytes were free
    try:
        with pytest.raises(OSError, match="File too large"):
            save(nn.Linear(64, 64), path, encode=encode)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_mode_and_links_are_respected(path: Path) -> None:
    old = os.umask(0o022)
    try:
        save(nn.Linear(2, 2), path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o600)
    link = path.with_name("link")
    link.symlink_to(path)
    save(nn.Linear(3, 3), link)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load(path, lambda: nn.Sequential(nn.Linear(3, 3))[0]).in_features == 3


# --- what must not be loaded ------------------------------------------------------------------------


def assert_rejected(path: Path, match: str) -> None:
    """The error is one `CheckpointError` naming the file; a module that was passed is as it was."""
    skeleton = Net()
    modules = [(n, id(m), m.training) for n, m in skeleton.named_modules()]
    tensors = [(n, id(p), p.data_ptr(), p.dtype) for n, p in skeleton.named_parameters()]
    state = copy.deepcopy(skeleton.state_dict())
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path, skeleton)
    assert str(path) in str(caught.value)
    assert [(n, id(m), m.training) for n, m in skeleton.named_modules()] == modules
    assert [(n, id(p), p.data_ptr(), p.dtype) for n, p in skeleton.named_parameters()] == tensors
    after = skeleton.state_dict()
    assert all(torch.equal(after[k], state[k]) for k in state)
    with pytest.raises(CheckpointError):
        load(path, Net)


def test_another_architecture(path: Path) -> None:
    save(net(), path)

    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    class Fewer(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.gain

    for skeleton, match in [
        (Other, "the children"),
        (Fewer, "'gain', which the architecture lacks"),
        (lambda: nn.Linear(2, 2), "needs a .*Net at ''"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            load(path, skeleton)


def test_own_parameters_must_have_the_saved_shape(path: Path) -> None:
    model = net()
    model.gain = nn.Parameter(torch.ones(1))
    save(model, path)
    assert_rejected(path, r"'gain' in shape \[1\], the architecture needs \[10\]")


@pytest.mark.parametrize(
    ("skeleton", "error", "match"),
    [
        ("Net", TypeError, "a function that makes one, got str"),
        (lambda: 3, TypeError, "must return an nn.Module, got int"),
        (nn.Linear(2, 2, device="meta"), ValueError, "must have real tensors"),
        (nn.LazyLinear(2), ValueError, "must have real tensors"),
    ],
)
def test_bad_skeletons(path: Path, skeleton: Any, error: type[Exception], match: str) -> None:
    save(nn.Linear(2, 2), path)
    with pytest.raises(error, match=f"load: skeleton {match}|load: .*{match}"):
        load(path, skeleton)


def test_values_come_back_when_a_module_refuses_its_state(path: Path) -> None:
    """A failure in the middle of loading, in the architecture's own code."""

    class Fussy(nn.Module):
        refuse = False

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            super()._load_from_state_dict(*args, **kwargs)
            if self.refuse:
                self.refuse = False
                raise RuntimeError("not this one")

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), Fussy()

    model = Whole().half()
    convert(model, {"b.first": Int8Linear.from_float})
    save(model, path)
    skeleton = Whole()
    skeleton.b.refuse = True
    before = copy.deepcopy(skeleton.state_dict())
    with pytest.raises(CheckpointError, match="not this one"):
        load(path, skeleton)
    after = skeleton.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) and after[k].dtype == torch.float32 for k in before)
    load(path, skeleton)
    assert isinstance(skeleton.b.first, Int8Linear)


def test_loading_runs_nothing_from_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pickle nor import nor eval is reached."""
    import builtins
    import importlib
    import pickle

    model = net()
    convert(model, {"head": Int8Linear.from_float})
    save(model, path)
    load(path, Net)  # what is imported lazily is imported now

    def forbidden(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"called with {args!r}")

    for module, name in [
        (pickle, "loads"),
        (pickle, "load"),
        (builtins, "eval"),
        (importlib, "import_module"),
    ]:
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(pickle, "Unpickler", forbidden)
    load(path, Net)
