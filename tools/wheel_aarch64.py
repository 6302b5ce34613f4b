"""``make wheel-aarch64``: a wheel for 64-bit Arm Linux, built and tried on another machine.

Cross-compiles the extension (cmake/aarch64-linux-gnu.cmake) against the headers of Debian's arm64 Python,
which apt fetches into the build folder, past the system's own packages. Then, on cores by qemu-user: the C++
test program of the very objects that are in the wheel; the extension in that Python, alone; the whole package
beside torch 2.10.0 for aarch64, which pip fetches (146 MB; ``--torch none`` leaves it out): layers converted,
run and reloaded, ``tautorch bench --quick``, and a part of the tests. Later torches on PyPI are built for
CUDA there and end on import without gigabytes of its libraries.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "aarch64-wheel"
SYSTEM = BUILD / "system"  # what the packages hold
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SUFFIX = f".cpython-{sys.version_info.major}{sys.version_info.minor}-aarch64-linux-gnu.so"
# Without dot products, with SDOT, with SMMLA too.
CPUS = {
    "cortex-a72": "scalar,neon",
    "neoverse-n1": "scalar,neon,neon_dotprod",
    "max": "scalar,neon,neon_dotprod,neon_i8mm",
}
# The same for torch, whose import ends on the first (its issue 176993); and what must be chosen.
PACKAGE_CPUS = {"a64fx": "neon", "neoverse-n1": "neon_dotprod", "max": "neon_i8mm"}
TORCH = "2.10.0"
TESTS = ("tests/ops/test_int8_linear.py",)
PART = "not reference and (test_sizes or test_int8_values or test_float_values)"


def say(text: str) -> None:
    print(f"== {text} ({time.perf_counter() - START:.0f} s)", flush=True)


def run(*command: str | Path, quiet: bool = False, **env: str) -> str:
    """What a command that must succeed prints; shown too, unless quiet."""
    done = subprocess.run(
        [str(word) for word in command], env={**os.environ, **env}, cwd=ROOT, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"{done.stdout[-6000:]}\nwheel-aarch64: {command[0]} ended with {done.returncode}")
    if not quiet:
        print(done.stdout, end="")
    return done.stdout


def fetch_python() -> None:
    """Debian's arm64 Python of this interpreter's version, with its headers, unpacked into SYSTEM."""
    if (SYSTEM / "usr" / "bin" / f"python{VERSION}").exists():
        return
    apt = BUILD / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    own = Path("/etc/apt/sources.list.d/debian.sources")
    options = [
        "APT::Architecture=arm64", "APT::Architectures=arm64", "APT::Sandbox::User=root",
        "Dir::State::status=/dev/null", f"Dir::State::lists={apt / 'lists'}", f"Dir::Cache={apt / 'cache'}",
        f"Dir::Etc::sourcelist={own if own.exists() else '/etc/apt/sources.list'}", "Dir::Etc::sourceparts=-",
    ]  # fmt: skip
    flags = [word for option in options for word in ("-o", option)]
    run("apt-get", *flags, "update", quiet=True)
    names = (f"python{VERSION}", f"libpython{VERSION}-dev", "libstdc++6")
    run("apt-get", *flags, "install", "-y", "--download-only", "--no-install-recommends", *names, quiet=True)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run("dpkg", "-x", package, SYSTEM, quiet=True)
    shutil.rmtree(apt)


def build_wheel() -> Path:
    """The wheel, in dist/."""
    # Python's headers alone: Debian's libc headers stay out, the cross compiler has its own.
    headers = BUILD / "include"
    for folder in (f"python{VERSION}", f"aarch64-linux-gnu/python{VERSION}"):
        source = SYSTEM / "usr" / "include" / folder
        shutil.copytree(source, headers / folder, dirs_exist_ok=True)
    definitions = {
        "CMAKE_TOOLCHAIN_FILE": ROOT / "cmake" / "aarch64-linux-gnu.cmake",
        "CMAKE_CXX_FLAGS": f"-I{headers}",  # for <aarch64-linux-gnu/pythonX.Y/pyconfig.h>
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": headers / f"python{VERSION}",
        "PYTHON_MODULE_EXTENSION": SUFFIX,
        "pybind11_DIR": run(sys.executable, "-m", "pybind11", "--cmakedir", quiet=True).strip(),
        "PYBIND11_USE_CROSSCOMPILING": "ON",
    }
    before = set((ROOT / "dist").glob("*.whl"))
    for old in before:
        if "aarch64" in old.name:
            old.unlink()
    pip = (sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation")
    run(
        *(*pip, "--wheel-dir", "dist"),
        f"--config-settings=build-dir={BUILD / 'cmake'}",
        *(f"--config-settings=cmake.define.{name}={value}" for name, value in definitions.items()),
        quiet=True, TAUTORCH_CUDA="off", SETUPTOOLS_EXT_SUFFIX=SUFFIX, _PYTHON_HOST_PLATFORM="linux-aarch64",
    )  # fmt: skip
    (wheel,) = (ROOT / "dist").glob("*aarch64.whl")
    return wheel


def check_wheel(wheel: Path) -> None:
    """Whole, of the right machine, with the glibc that its tag says."""
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        inside = [name for name in archive.namelist() if name.endswith(".so")]
        assert inside == [f"tautorch/_C{SUFFIX}"], inside
        shutil.rmtree(BUILD / "site", ignore_errors=True)
        archive.extractall(BUILD / "site")
    module = BUILD / "site" / inside[0]
    header = run("readelf", "-h", module, quiet=True)
    assert "AArch64" in header, header
    needed = re.findall(r"GLIBC_2\.(\d+)", run("readelf", "-V", module, quiet=True))
    newest, tag = max(map(int, needed)), re.search(r"manylinux_2_(\d+)_aarch64", wheel.name)
    assert tag is None or newest <= int(tag[1]), f"needs glibc 2.{newest}"
    libraries = re.findall(r"\[(.*)\]", run("readelf", "-d", module, quiet=True))
    print(f"{wheel.name}: {wheel.stat().st_size >> 10} KB, glibc 2.{newest}, {', '.join(libraries)}")


def check_objects() -> None:
    """The C++ test program over the wheel's own object files, on every core."""
    run("cmake", "--build", BUILD / "cmake", "--target", "native_test", quiet=True, PATH=TOOLS)
    program, golden = BUILD / "cmake/tests/native/native_test", ROOT / "tests/golden/golden.json"
    for cpu, kernels in CPUS.items():
        emulator = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu)
        out = run(*emulator, program, golden, "--expect", kernels, quiet=True)
        assert out.endswith("all equal\n"), out
        print(f"{cpu}: {kernels}: all equal")


def emulated(cpu: str, *arguments: str | Path, quiet: bool = False) -> str:
    """Runs the arm64 Python."""
    site = BUILD / "site"
    return run(
        *("qemu-aarch64", "-L", SYSTEM, "-cpu", cpu, SYSTEM / "usr" / "bin" / f"python{VERSION}"), *arguments,
        quiet=quiet, PYTHONHOME=str(SYSTEM / "usr"), PYTHONPATH=f"{site}{os.pathsep}{ROOT}",
        OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", PYTHONNOUSERSITE="1",
    )  # fmt: skip


def install_torch(version: str) -> None:
    """torch and what the package and its tests import, for aarch64, beside the unpacked wheel."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
    pip += ["--target", str(BUILD / "site"), "--python-version", VERSION]
    pip += ["--platform", "manylinux_2_28_aarch64", "--platform", "manylinux_2_17_aarch64"]
    # By name: pip reads the conditions of torch's own list for the machine it runs on.
    needs = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing_extensions")
    ours = ("numpy", "safetensors", "rich", "typer", "pytest", "pytest-benchmark", "hypothesis")
    run(*pip, "--no-deps", f"torch=={version}", quiet=True)
    run(*pip, *needs, *ours, quiet=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", metavar="VERSION", default=TORCH, help=f"default {TORCH}; none: without")
    parser.add_argument("--wheel", type=Path, help="try this one; none is built")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="what pytest is given; more after --")
    parser.add_argument("-k", default=PART, help="which tests, as pytest's -k")
    options = parser.parse_args()
    for tool, package in {
        "apt-get": "a Debian system",
        "aarch64-linux-gnu-g++": "apt-get install g++-aarch64-linux-gnu",
        "qemu-aarch64": "apt-get install qemu-user",
    }.items():
        if not shutil.which(tool):
            sys.exit(f"wheel-aarch64: {tool} is not installed; {package}")
    say(f"Python {VERSION} for arm64")
    fetch_python()
    say("wheel")
    wheel = options.wheel or build_wheel()
    check_wheel(wheel)
    if not options.wheel:
        say("the C++ tests")
        check_objects()
    for cpu in CPUS:
        say(f"the extension on {cpu}")
        emulated(cpu, ROOT / "tools" / "try_extension.py", BUILD / "site" / "tautorch" / f"_C{SUFFIX}")
    if options.torch != "none":
        say(f"torch {options.torch}")
        install_torch(options.torch)
        for cpu, kernel in PACKAGE_CPUS.items():
            say(f"the package on {cpu}")
            emulated(cpu, ROOT / "tools" / "try_package.py", "--expect", kernel)
            emulated(cpu, "-m", "tautorch", "bench", "--quick", "--kernel", kernel)
            pytest = ("-m", "pytest", "-q", "-x", "-rN", "-p", "no:cacheprovider")
            emulated(cpu, *pytest, "-k", options.k, *options.tests)
    say("done")


if __name__ == "__main__":
    START = time.perf_counter()
    main()
