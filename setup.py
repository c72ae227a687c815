"""Builds the native libraries with CMake and puts them into the package; everything else is in pyproject.toml.

Environment variables:

    CMLM_FAST_NATIVE=0                    installs pure Python
    CMLM_FAST_CUDA=auto|0|1               auto: CUDA kernels if nvcc works; 1: fails without it
    CMLM_FAST_CUDA_ARCHS='90a-real;120'   builds for these architectures only
    CMLM_FAST_SANITIZE=1                  builds into build/sanitize with ASan and UBSan
    MAX_JOBS                              limits parallel compiles
    CXX, CUDACXX, CUDAHOSTCXX             choose compilers

ccache is used if it is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "cmlm_fast"


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    """The environment variable `name`, which must be one of `allowed`."""
    value = os.environ.get(name, default)
    if value not in allowed:
        raise SystemExit(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def tool(name: str) -> str | None:
    """Path of a program, looked up next to this Python first: its virtual environment may not be active."""
    return shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]))


class FreshPackage(build_py):
    """Copies the Python files into a folder cleared of any earlier build."""

    def run(self) -> None:
        if not getattr(self, "editable_mode", False):
            shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
        elif not native:
            remove_libraries(ROOT / PACKAGE)
        super().run()


def remove_libraries(package: Path) -> None:
    """Deletes the libraries of an earlier build, some of which this one may not produce."""
    for library in (*package.glob("_C*.so"), package / f"_build{sysconfig.get_config_var('EXT_SUFFIX')}"):
        library.unlink(missing_ok=True)


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, then installs the libraries next to the Python files."""

    def run(self) -> None:
        sanitize = choice("CMLM_FAST_SANITIZE", "0", ("0", "1")) == "1"
        if sanitize:  # outside the package: loaded through CMLM_FAST_LIBRARY
            package = ROOT / "build" / "sanitize"
        elif self.inplace or getattr(self, "editable_mode", False):
            package = ROOT / PACKAGE
        else:
            package = Path(self.build_lib).resolve() / PACKAGE
        cmake = tool("cmake")
        if cmake is None:
            raise SystemExit("cmake not found: pip install cmake ninja, or build with isolation")
        kind = "sanitize" if sanitize else sys.implementation.cache_tag
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{kind}"
        build.mkdir(parents=True, exist_ok=True)
        # The cache holds paths of a build environment that may be gone (isolated builds): reconfigure, but keep the objects.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        variables = {**self.variables(), "CMLM_SANITIZE": "ON" if sanitize else "OFF"}
        generator = ["-G", "Ninja"] if "CMAKE_MAKE_PROGRAM" in variables else []
        options = [f"-D{name}={value}" for name, value in variables.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *generator, *options], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        remove_libraries(package)
        strip = [] if sanitize else ["--strip"]
        subprocess.run([cmake, "--install", str(build), "--prefix", str(package), *strip], check=True)
        manifest = (build / "install_manifest.txt").read_text().splitlines()
        self.outputs = [str(Path(self.build_lib) / PACKAGE / Path(line).name) for line in manifest]

    def variables(self) -> dict[str, str]:
        """The variables passed to CMake, such as where this Python has torch, pybind11 and its headers."""
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths

        variables = {
            "CMAKE_BUILD_TYPE": "Release",
            "VERSION": self.distribution.get_version(),
            "CMLM_CUDA": choice("CMLM_FAST_CUDA", "auto", ("auto", "0", "1")),
            "CMLM_CUDA_ARCHS": os.environ.get("CMLM_FAST_CUDA_ARCHS", ""),
            "TORCH_INCLUDE": ";".join(include_paths()),
            "TORCH_LIB": str(Path(torch.__file__).parent / "lib"),
            "TORCH_VERSION": torch.__version__,
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYBIND11_INCLUDE": pybind11.get_include(),
            "EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        }
        ninja, ccache = tool("ninja"), tool("ccache")
        if ccache:
            variables.update(CMAKE_CXX_COMPILER_LAUNCHER=ccache, CMAKE_CUDA_COMPILER_LAUNCHER=ccache)
        if ninja:
            variables["CMAKE_MAKE_PROGRAM"] = ninja
        return variables

    def get_outputs(self) -> list[str]:
        return getattr(self, "outputs", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}


native = choice("CMLM_FAST_NATIVE", "1", ("0", "1")) == "1"
setup(
    # Declared so that the wheel is tagged for this platform; CMakeLists.txt knows the sources.
    ext_modules=[Extension(f"{PACKAGE}._build", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshPackage},
)
