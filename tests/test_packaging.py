"""The package works however it is installed, and never stands in the way of a distribution called `kernels`."""

import json
import os
import pathlib
import shutil
import subprocess
import sysconfig
import textwrap
import venv
import zipfile

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
# Rooms by the folder that holds them in the source tree; all are inside the package once it is installed.
SHIPPED = {
    ".".join(["tqcompile", *path.relative_to(ROOT / home).with_suffix("").parts]): path.relative_to(ROOT / home)
    for home, room in (
        ("", "passes"),
        ("", "kernels"),
        ("tqcompile", "bench"),
        ("tqcompile", "explain"),
        ("tqcompile", "paper"),
        ("tqcompile", "sweep"),
        ("tqcompile", "validate"),
    )
    for path in (ROOT / home / room).rglob("*.py")
}

PROBE = textwrap.dedent(
    """
    import importlib, json, sys
    from importlib.metadata import entry_points
    import tqcompile
    files = {name: importlib.import_module(name).__file__ for name in ["tqcompile", *sys.argv[1:]]}
    import torch._dynamo
    points = entry_points(group="torch_dynamo_backends", name="turboquant")
    print(json.dumps({
        "files": files,
        "points": [point.value for point in points],
        "listed": "turboquant" in torch._dynamo.list_backends(exclude_tags=()),
        "callable": bool(points) and callable(torch._dynamo.lookup_backend("turboquant")),
    }))
    """
)


class Sandbox:
    """An environment of its own that borrows every installed package from ours, but runs none of its .pth files."""

    def __init__(self, root):
        self.root = root
        venv.EnvBuilder(with_pip=False, symlinks=True).create(root / "env")
        self.python = root / "env" / "bin" / "python"
        self.packages = next((root / "env" / "lib").glob("python*/site-packages"))
        borrowed = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        (self.packages / "borrowed.pth").write_text("\n".join(borrowed))
        self.elsewhere = root / "elsewhere"
        self.elsewhere.mkdir()
        self.source = root / "source"
        for name in ("tqcompile", "passes", "kernels"):
            shutil.copytree(ROOT / name, self.source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.source)

    def run(self, *arguments, cwd=None, **environment):
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            [self.python, *arguments],
            cwd=cwd or self.elsewhere,
            env=clean | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def pip(self, *arguments):
        return self.run("-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--no-index", "--quiet")

    def probe(self, *, cwd=None, **environment):
        return json.loads(self.run("-c", PROBE, *SHIPPED, cwd=cwd, **environment).splitlines()[-1])

    def build_wheel(self):
        self.pip("wheel", str(self.source), "--wheel-dir", str(self.root / "wheels"))
        return next((self.root / "wheels").glob("tqcompile-*.whl"))

    def install_foreign_kernels(self):
        """A distribution called `kernels`, as Hugging Face publishes one."""
        (self.packages / "kernels").mkdir()
        (self.packages / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'\n")
        (self.packages / "kernels-0.0.1.dist-info").mkdir()
        metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n"
        (self.packages / "kernels-0.0.1.dist-info" / "METADATA").write_text(metadata)


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def assert_all_from(probed, place):
    assert set(probed["files"]) == {"tqcompile", *SHIPPED}
    strangers = {
        name: file for name, file in probed["files"].items() if place not in pathlib.Path(file).resolve().parents
    }
    assert not strangers


def assert_registered(probed):
    assert probed["points"] == ["tqcompile.backend:turboquant_backend"]
    assert probed["listed"]
    assert probed["callable"]


def test_a_wheel_holds_the_whole_house_inside_one_package(sandbox):
    wheel = sandbox.build_wheel()
    names = zipfile.ZipFile(wheel).namelist()
    ours = {name for name in names if ".dist-info/" not in name}
    expected = {f"tqcompile/{path.name}" for path in (ROOT / "tqcompile").glob("*.py")}
    assert ours == expected | {f"tqcompile/{path}" for path in SHIPPED.values()}
    assert any(name.endswith("/LICENSE") for name in names)

    sandbox.pip("install", "--ignore-installed", str(wheel))
    sandbox.install_foreign_kernels()
    probed = sandbox.probe()
    assert_all_from(probed, sandbox.packages.resolve() / "tqcompile")
    assert_registered(probed)
    assert sandbox.run("-c", "import kernels; print(kernels.OWNER)") == "somebody else\n"


@pytest.mark.parametrize("mode", ["default", "strict", "compat"])
def test_an_editable_install_finds_the_house_in_the_source_tree(sandbox, mode):
    setting = [] if mode == "default" else ["--config-settings", f"editable_mode={mode}"]
    sandbox.pip("install", "--ignore-installed", *setting, "--editable", str(sandbox.source))
    probed = sandbox.probe()
    assert_all_from(probed, sandbox.source.resolve())
    assert_registered(probed)
    sandbox.install_foreign_kernels()
    for cwd in (sandbox.elsewhere, sandbox.source):
        assert sandbox.run("-c", "import kernels; print(kernels.OWNER)", cwd=cwd) == "somebody else\n"


def test_the_source_tree_works_without_an_install(sandbox):
    assert_all_from(sandbox.probe(PYTHONPATH=str(sandbox.source)), sandbox.source.resolve())
    assert_all_from(sandbox.probe(cwd=sandbox.source), sandbox.source.resolve())


def test_a_distribution_called_kernels_wins_over_our_folder(sandbox):
    sandbox.install_foreign_kernels()
    ask = "import kernels, tqcompile.kernels; print(kernels.OWNER, list(tqcompile.kernels.__path__))"
    for where in ({"PYTHONPATH": str(sandbox.source)}, {"cwd": sandbox.source}):
        assert sandbox.run("-c", ask, **where) == f"somebody else ['{sandbox.source / 'kernels'}']\n"


def test_transformers_can_be_imported_from_the_root_of_the_source_tree(sandbox):
    ask = "import transformers; from transformers import AutoModelForCausalLM, StaticCache; print('imported')"
    assert sandbox.run("-c", ask, cwd=sandbox.source) == "imported\n"


def test_this_environment_lists_the_backend():
    assert "turboquant" in torch._dynamo.list_backends(exclude_tags=())
