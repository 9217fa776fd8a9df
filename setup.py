"""Build mien: the repository root is the package `mien`; CMake builds the native library."""

import hashlib
import os
import runpy
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
ROOMS = ["core*", "kernels*", "models*", "cli*", "benchmarks*"]


class RootPackage(build_py):
    """Keep setup.py itself out of the wheel (it lies inside the root package)."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != ("mien", "setup")]


class CMakeBuild(build_ext):
    """Run CMake once and leave libmien.so where kernels/native.py looks for it."""

    def get_ext_filename(self, fullname):  # a plain shared library: no Python ABI suffix
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        how = runpy.run_path(str(ROOT / "kernels/toolkit.py"))["choose"]()
        options = [*how.options(), f"-DMIEN_OUTPUT_DIR={out}"]
        # A folder for each way to build: CMake would keep a compiler, or the lack of one, for good.
        given = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
        kind = hashlib.sha256(f"{how} {options} {given}".encode()).hexdigest()[:8]
        build = Path(self.build_temp) / f"cmake-{kind}"
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        environment = {**os.environ, **how.environment()}
        subprocess.run([*configure, *options], check=True, env=environment)
        subprocess.run(["cmake", "--build", build, "--parallel"], check=True, env=environment)


class PlatformWheel(bdist_wheel):
    """Tag the wheel py3-none-<platform>: it holds a C library and no Python extension."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    package_dir={"mien": "."},
    packages=["mien"] + [f"mien.{name}" for name in find_packages(include=ROOMS)],
    package_data={
        "mien.benchmarks": ["*.json"],
        "mien.cli.monitor": ["page.*", "*.js"],
        "mien.kernels": ["csrc/include/*.h"],
        "mien.core.faces": ["*.npz"],
        "mien.core.config.presets": ["*.toml", "costs.json"],
        "mien.core.config.recipes": ["*.toml"],
    },
    include_package_data=False,
    ext_modules=[Extension("mien.kernels.libmien", sources=[])],
    cmdclass={"build_py": RootPackage, "build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    zip_safe=False,
)
