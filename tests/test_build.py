"""setup.py: how it compiles, and that a build that fails leaves a working package."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from capsops.backends import fingerprint

ROOT = Path(__file__).resolve().parents[1]

ARCHS_VARIABLES = ("CAPSOPS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no c++ on the path")


def _load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("capsops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


setup_py = _load_setup()


@pytest.mark.parametrize(
    ("machine", "isas"),
    [
        ("x86_64", ["baseline", "avx2", "avx512"]),
        ("AMD64", ["baseline", "avx2", "avx512"]),
        ("aarch64", ["baseline"]),
        ("arm64", ["baseline"]),
    ],
)
def test_instruction_sets_by_machine(machine: str, isas: list[str]) -> None:
    assert list(setup_py.cpu_isas(machine)) == isas


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("80", ["-gencode=arch=compute_80,code=sm_80"]),
        ("90a", ["-gencode=arch=compute_90a,code=sm_90a"]),
        ("80;80", ["-gencode=arch=compute_80,code=sm_80"]),
        ("86,89", ["-gencode=arch=compute_80,code=sm_86", "-gencode=arch=compute_80,code=sm_89"]),
        ("89+PTX", [f"-gencode=arch=compute_89,code={code}_89" for code in ("sm", "compute")]),
        (
            "80; 90+PTX",
            [
                "-gencode=arch=compute_80,code=sm_80",
                "-gencode=arch=compute_90,code=sm_90",
                "-gencode=arch=compute_90,code=compute_90",
            ],
        ),
    ],
)
def test_cuda_architectures(archs: str, flags: list[str]) -> None:
    assert setup_py.cuda_arch_flags(archs) == flags


def _script(path: Path, lines: str) -> str:
    """A program that runs these lines of shell."""
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("listed", "archs"),
    [
        ("8.0;8.6 9.0+PTX", "80;86;90+PTX"),
        ("9.0a", "90a"),
        ("Ampere Hopper", "80;86+PTX;90+PTX"),
        ("Ampere+Tegra, Ada", "87;89+PTX"),
        ("Blackwell", "100;103;120;121+PTX"),
        (" 5.2 6.0 7.5+PTX 8.0 8.6  12.0+PTX ", "80;86;120+PTX"),  # as container images set it
        ("Turing;8.0;8.0;", "80"),
    ],
)
def test_torch_cuda_arch_list(listed: str, archs: str) -> None:
    assert setup_py.cuda_archs({"TORCH_CUDA_ARCH_LIST": listed}, "no nvcc is asked") == archs


@pytest.mark.parametrize("listed", ["Hopper2", "90", "8.0 hopper", "Ampere+PTX", "8.0+ptx", "all"])
def test_torch_cuda_arch_list_with_what_torch_does_not_know(listed: str) -> None:
    word = listed.split()[-1]
    with pytest.raises(ValueError, match=re.escape(f"TORCH_CUDA_ARCH_LIST: got '{word}' in ")) as error:
        setup_py.cuda_archs({"TORCH_CUDA_ARCH_LIST": listed}, "no nvcc is asked")
    assert "takes numbers such as 8.0, 9.0a or 9.0+PTX, native, Kepler+Tesla" in str(error.value)


def test_torch_cuda_arch_list_of_gpus_that_are_too_old() -> None:
    with pytest.raises(
        setup_py.NotBuiltError, match="TORCH_CUDA_ARCH_LIST is '7.0 Turing', and the"
    ) as error:
        setup_py.cuda_archs({"TORCH_CUDA_ARCH_LIST": "7.0 Turing"}, "no nvcc is asked")
    assert not error.value.failed


def test_torch_cuda_arch_list_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    environ = {"TORCH_CUDA_ARCH_LIST": "native"}
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: 'native' needs nvidia-smi"):
        setup_py.cuda_archs(environ, "no nvcc is asked")
    _script(tmp_path / "nvidia-smi", "echo 12.0; echo 8.9; echo 12.0")
    assert setup_py.cuda_archs(environ, "no nvcc is asked") == "89;120+PTX"


def test_our_own_variable_comes_first() -> None:
    environ = {"TORCH_CUDA_ARCH_LIST": "8.0", "CAPSOPS_CUDA_ARCHS": "90"}
    assert setup_py.cuda_archs(environ, "no nvcc is asked") == "90"


@pytest.mark.parametrize(
    ("toolkit", "known", "archs"),
    [
        ("11.8", "50 60 70 75 80 86 87 89 90", "80;86;89;90+PTX"),
        ("12.4", "70 75 80 86 87 89 90 90a", "80;86;89;90+PTX"),
        ("12.8", "75 80 86 87 89 90 100 101 120", "80;86;89;90;100;120+PTX"),
        ("13.0", "75 80 86 87 88 89 90 100 110 103 120 121", "80;86;89;90;100;120+PTX"),
    ],
)
def test_default_architectures_are_those_that_nvcc_knows(
    toolkit: str, known: str, archs: str, tmp_path: Path
) -> None:
    lines = "\n".join(f"echo sm_{arch}" for arch in known.split())
    nvcc = _script(tmp_path / "nvcc", f'[ "$1" = --list-gpu-code ] || exit 1\n{lines}')
    assert setup_py.cuda_archs({"TORCH_CUDA_ARCH_LIST": ""}, nvcc) == archs


def test_an_nvcc_that_is_too_old(tmp_path: Path) -> None:
    nvcc = _script(tmp_path / "nvcc", "echo \"nvcc fatal : Unknown option '--list-gpu-code'\" >&2; exit 1")
    with pytest.raises(setup_py.NotBuiltError, match="names none of 80, 86, .*Unknown option") as error:
        setup_py.default_archs(nvcc)
    assert "CAPSOPS_CUDA_ARCHS" in error.value.remedy


def test_cuda_choice() -> None:
    assert setup_py.cuda_choice({}) == "auto"
    assert setup_py.cuda_choice({"CAPSOPS_BUILD_CUDA": ""}) == "auto"
    assert setup_py.cuda_choice({"CAPSOPS_BUILD_CUDA": "1"}) == "1"
    with pytest.raises(ValueError, match="CAPSOPS_BUILD_CUDA takes 0, 1 or auto, got 'yes'"):
        setup_py.cuda_choice({"CAPSOPS_BUILD_CUDA": "yes"})


def test_every_kernel_is_compiled_for_every_instruction_set() -> None:
    objects = setup_py.cpu_objects("x86_64", {"CXXFLAGS": "-g"})
    sources = {source for source, _ in objects.values()}
    assert sources == set((ROOT / "csrc/cpu").glob("*.cpp"))
    assert len(objects) == 1 + 3 * (len(sources) - 1)
    order = ["o", "baseline", "avx2", "avx512"]  # the linker keeps the first copy of an inline function
    levels = [order.index(name.split(".")[1]) for name in objects]
    assert levels == sorted(levels)
    for name, (source, flags) in objects.items():
        assert "-fopenmp" in flags
        assert "-g" in flags
        assert "-ffast-math" not in flags  # breaks the range reduction of exp
        # So that a new pip environment recompiles only the bindings.
        assert (setup_py.includes()[1] in flags) == (source.stem == "bindings")
        if source.stem != "bindings":
            isa = name.split(".")[1]
            assert f"-DCAPSOPS_ISA={isa}" in flags
            assert ("-mavx512f" in flags) == (isa == "avx512")


def test_no_flags_of_another_processor_on_arm() -> None:
    objects = setup_py.cpu_objects("aarch64", {})
    assert not [flag for _, flags in objects.values() for flag in flags if flag.startswith("-m")]
    assert len(objects) == len({source for source, _ in objects.values()})


def test_cuda_objects() -> None:
    objects = setup_py.cuda_objects("90")
    assert {source for source, _ in objects.values()} == {
        path for path in (ROOT / "csrc/cuda").glob("*") if path.suffix in (".cu", ".cpp")
    }
    for source, flags in objects.values():
        assert "-gencode=arch=compute_90,code=sm_90" in flags
        assert (setup_py.includes()[1] in flags) == (source.stem == "bindings")


def test_first_error_is_that_of_the_compiler() -> None:
    output = textwrap.dedent("""\
        [1/3] compiling a.o
        FAILED: [code=1] a.o
        c++ -c a.cpp -o a.o
        a.cpp:1:1: error: 'x' does not name a type
            1 | x
        [2/3] compiling b.o
        ninja: build stopped: subcommand failed.
        """)
    assert setup_py.first_error(output) == "a.cpp:1:1: error: 'x' does not name a type\n    1 | x"
    assert setup_py.first_error("ninja: error: 'a.cpp' missing\n") == "ninja: error: 'a.cpp' missing"


@needs_compiler
def test_ninja_compiles_only_what_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a folder: with $igns"
    folder.mkdir()
    header, one, two = (folder / name for name in ("value.h", "one.cpp", "two.cpp"))
    header.write_text("#define VALUE 1\n")
    one.write_text('#include "value.h"\nint one() { return VALUE; }\n')
    two.write_text("int two() { return 2; }\n")
    objects = {"one.o": (one, ["-fPIC", "-DTEXT=\"a $b 'c'\""]), "two.o": (two, ["-fPIC"])}
    make = partial(setup_py.make, folder / "build", ["c++"], objects, [], "fix it")

    def compiled() -> set[str]:
        assert make().exists()
        return set(re.findall(r"\] \w+ (\S+)", capfd.readouterr().out))

    assert compiled() == {"one.o", "two.o", "library.so"}
    assert compiled() == set()
    header.write_text("#define VALUE 3\n")
    assert compiled() == {"one.o", "library.so"}

    two.write_text("this is no C++\n")
    with pytest.raises(setup_py.NotBuiltError, match=r"compilation failed: .*two\.cpp:1:1: error") as caught:
        make()
    assert caught.value.remedy == "fix it, then install capsops again"
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(setup_py.NotBuiltError, match="invalid -j parameter"):
        make()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "not found"),
        ("exit 1", "the compiler printed nothing"),
        (
            'case "$*" in *-fopenmp*) echo "unsupported option -fopenmp" >&2; exit 1;; esac',
            "unsupported option -fopenmp",
        ),
    ],
    ids=["missing", "silent", "without OpenMP"],
)
def test_a_failing_compiler_is_reported(
    script: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(setup_py.NotBuiltError, match=f"compilation failed: .*{reason}") as caught:
        setup_py.build_cpu(tmp_path / "build")
    assert caught.value.failed
    assert caught.value.remedy.startswith("install g++")


@needs_compiler
def test_missing_python_headers_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py, "includes", lambda: ["-isystem", setup_py.pybind11.get_include()])
    bindings = ROOT / "csrc/cpu/bindings.cpp"
    monkeypatch.setattr(
        setup_py,
        "cpu_objects",
        lambda *_: {
            "bindings.o": (bindings, [*setup_py.CPU_FLAGS, f"-I{ROOT / 'csrc'}", *setup_py.includes()])
        },
    )
    with pytest.raises(setup_py.NotBuiltError, match=r"Python\.h: No such file") as caught:
        setup_py.build_cpu(tmp_path)
    assert "python3-dev" in caught.value.remedy


def _environment(**variables: str) -> dict[str, str]:
    unset = ("CXX", "CAPSOPS_IMPL", "CAPSOPS_CPU_ISA", "CAPSOPS_BUILD_CUDA", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in (*unset, *ARCHS_VARIABLES)}
    return {**kept, "CAPSOPS_BUILD_CUDA": "0", **variables}


def _run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=_environment(**variables), capture_output=True, text=True)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A copy of the files that an installation needs, with nothing built."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for folder in ("capsops", "csrc", "infocapsgan"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, copy)
    return copy


USE = "import capsops, torch; print(capsops.squash(torch.tensor([3.0, 4.0])).norm().item())"


def _assert_the_reference_works(folder: Path) -> None:
    """The package in the folder computes, and reports what is missing."""
    used = _run(sys.executable, "-c", USE, cwd=folder)
    assert used.returncode == 0, used.stderr
    assert float(used.stdout) == pytest.approx(25 / 26)
    report = _run(sys.executable, "-m", "capsops", cwd=folder)
    assert report.returncode == 0, report.stderr
    assert "not built: compilation failed: the compiler printed nothing" in report.stdout
    assert "to fix it: install g++" in report.stdout
    assert re.search(r"^ +reference +cpu +available$", report.stdout, re.MULTILINE)


def test_build_without_a_compiler_succeeds_and_reports_why(scratch: Path) -> None:
    stale = scratch / "capsops" / f"_cpu{setup_py.sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_text("of an earlier build")
    # The build must do without torch, so an import of it fails.
    (scratch / "torch.py").write_text("raise ImportError('the build imports torch')\n")
    build = _run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=scratch, CXX="/bin/false")
    assert build.returncode == 0, build.stderr
    assert "capsops._cpu IS NOT BUILT" in build.stderr
    assert "CAPSOPS_BUILD_CUDA was 0" not in build.stderr
    assert not stale.exists()
    record = json.loads((scratch / "capsops/_build.json").read_text())
    assert record["cpu"]["built"] is False
    assert record["cuda"]["reason"] == "CAPSOPS_BUILD_CUDA was 0"
    (scratch / "torch.py").unlink()
    _assert_the_reference_works(scratch)


def test_a_required_cuda_build_fails_without_nvcc(scratch: Path) -> None:
    (scratch / "csrc/cuda").mkdir(exist_ok=True)
    (scratch / "csrc/cuda/empty.cu").touch()
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    build = _run(
        *(sys.executable, "setup.py", "build_ext", "--inplace"),
        cwd=scratch,
        CXX="/bin/false",
        CAPSOPS_BUILD_CUDA="1",
        CUDA_HOME="",
        PATH=path,
    )
    assert build.returncode != 0
    assert "CAPSOPS_BUILD_CUDA=1: there is no nvcc" in build.stderr


def test_cuda_is_built_only_with_nvcc_and_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With nvcc but no driver, as in a container for compiling, a build would take minutes for nothing."""
    loaded = []

    def library(name: str) -> object:
        loaded.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    def no_compilation(*args: object) -> None:
        raise AssertionError("nothing is compiled")

    monkeypatch.setattr(setup_py.ctypes, "CDLL", library)
    monkeypatch.setattr(setup_py, "make", no_compilation)
    monkeypatch.setattr(setup_py.shutil, "which", lambda name, path=None: f"/cuda/bin/{name}")
    monkeypatch.setenv("CAPSOPS_CUDA_ARCHS", "90")
    monkeypatch.delenv("CAPSOPS_BUILD_CUDA", raising=False)
    with pytest.raises(
        setup_py.NotBuiltError, match=r"^there is no NVIDIA driver here \(libcuda.so.1\)$"
    ) as error:
        setup_py.build_cuda(tmp_path)
    assert loaded == ["libcuda.so.1"]
    assert "CAPSOPS_BUILD_CUDA=1" in error.value.remedy
    assert not error.value.failed
    monkeypatch.setenv("CAPSOPS_BUILD_CUDA", "1")
    with pytest.raises(AssertionError, match="nothing is compiled"):
        setup_py.build_cuda(tmp_path)
    monkeypatch.setenv("CAPSOPS_BUILD_CUDA", "auto")
    monkeypatch.setattr(setup_py.ctypes, "CDLL", loaded.append)
    with pytest.raises(AssertionError, match="nothing is compiled"):
        setup_py.build_cuda(tmp_path)


def test_the_record_knows_sources_toolkit_and_architectures_of_the_cuda_extension(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    release = "Cuda compilation tools, release 12.4, V12.4.131"
    nvcc = _script(
        tmp_path / "nvcc", f'case $1 in --version) echo "{release}";; *) echo sm_80; echo sm_90;; esac'
    )
    monkeypatch.setattr(setup_py, "make", lambda *_: tmp_path / "library.so")
    monkeypatch.setattr(setup_py.shutil, "which", lambda name, path=None: nvcc)
    monkeypatch.setenv("CAPSOPS_BUILD_CUDA", "1")
    for variable in ARCHS_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    _, facts = setup_py.build_cuda(tmp_path)
    assert facts["fingerprint"] == fingerprint.cuda(ROOT)
    assert facts["archs"] == "80;90+PTX"
    assert facts["toolkit"] == "12.4"
    assert facts["compiler"] == "nvcc release 12.4, V12.4.131"


@needs_compiler
def test_the_remedy_for_a_failing_nvcc_is_about_nvcc(scratch: Path) -> None:
    (scratch / "csrc/cuda").mkdir(exist_ok=True)
    (scratch / "csrc/cuda/empty.cu").touch()
    (scratch / "bin").mkdir()
    _script(scratch / "bin/nvcc", "echo \"nvcc fatal: Unsupported gpu architecture 'compute_90'\"; exit 1")
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    variables = {"CXX": "/bin/false", "CAPSOPS_BUILD_CUDA": "auto", "CUDA_HOME": str(scratch)}
    variables["CAPSOPS_CUDA_ARCHS"] = "90"
    driver = scratch / "lib/libcuda.so.1"  # any library will do
    driver.parent.mkdir()
    (scratch / "driver.cpp").write_text("int driver() { return 0; }\n")
    subprocess.run(["c++", "-shared", "-fPIC", scratch / "driver.cpp", "-o", driver], check=True)
    build = _run(*command, cwd=scratch, LD_LIBRARY_PATH=str(driver.parent), **variables)
    assert build.returncode == 0, build.stderr
    record = json.loads((scratch / "capsops/_build.json").read_text())["cuda"]
    assert "Unsupported gpu architecture" in record["reason"]
    assert "CAPSOPS_CUDA_ARCHS" in record["remedy"]


def test_a_clone_in_the_working_directory_is_not_the_package(tmp_path: Path) -> None:
    """In the folder above a clone called capsops, `import capsops` imports the package, not the clone."""
    clone = tmp_path / "capsops"
    (clone / "capsops").mkdir(parents=True)
    for path in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / path, clone)
    (clone / "capsops/__init__.py").write_text("__version__ = '1'\nnn = 'the package'\n")
    target = tmp_path / "site"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    )
    done = _run(*pip, "-e", str(clone), cwd=tmp_path, CXX="/bin/false")
    assert done.returncode == 0, done.stdout + done.stderr
    code = f"import site; site.addsitedir({str(target)!r}); import capsops; print(capsops.nn)"
    # -S leaves out the packages of the environment, which may include capsops.
    used = _run(sys.executable, "-S", "-c", code, cwd=tmp_path)
    assert used.stdout.strip() == "the package", used.stderr


@pytest.mark.slow
def test_wheel_without_a_compiler(scratch: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation")
    install = _run(*pip, "--target", str(target), str(scratch), cwd=tmp_path, CXX="/bin/false")
    assert install.returncode == 0, install.stdout + install.stderr
    _assert_the_reference_works(target)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_compiler
def test_wheel_from_an_sdist(scratch: Path, tmp_path: Path) -> None:
    sdist = _run(sys.executable, "setup.py", "sdist", "--dist-dir", str(tmp_path / "dist"), cwd=scratch)
    assert sdist.returncode == 0, sdist.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation")
    install = _run(*pip, "--target", str(target), str(archive), cwd=tmp_path)
    assert install.returncode == 0, install.stdout + install.stderr
    report = _run(sys.executable, "-m", "capsops", cwd=target)
    assert re.search(r"^ +cpu +cpu +available$", report.stdout, re.MULTILINE), report.stdout + report.stderr


def _symbols(item: Path, kinds: str) -> set[str]:
    listed = subprocess.run(["nm", "--defined-only", item], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in listed.splitlines())
    return {name for *_, kind, name in rows if kind in kinds}


def test_no_instruction_set_leaks_into_shared_functions() -> None:
    """An inline function in several object files must come from the baseline, which runs everywhere."""
    suffix = setup_py.sysconfig.get_config_var("EXT_SUFFIX")
    objects = sorted((ROOT / "build" / f"native{Path(suffix).stem}" / "cpu").glob("*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the object files of an editable installation, and nm")
    everywhere = set().union(*(_symbols(o, "TWVu") for o in objects if not re.search("avx", o.name)))
    for item in objects:
        isa = re.search("avx[0-9]+", item.name)
        if isa:
            leaks = {name for name in _symbols(item, "WVu") - everywhere if isa.group() not in name}
            assert not leaks, f"{item.name}: {sorted(leaks)}"


SANITIZED = (
    *("squash", "predictions", "dynamic_routing", "capsule_routing", "couplings", "edges", "threads"),
    *("properties", "bindings", "arguments", "fuzz"),
)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@needs_compiler
def test_kernels_under_sanitizers(scratch: Path) -> None:
    """The tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    The tests of precision are left out: instrumented code computes its sums in another order.
    """
    shutil.copytree(ROOT / "tests", scratch / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    sanitizers = "-fsanitize=address,undefined"
    variables = {
        "CXXFLAGS": f"-O1 -g1 {sanitizers} -fno-sanitize-recover=all",
        "LDFLAGS": sanitizers,
        # The interpreter is not instrumented, and torch does not free all of its memory.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(scratch),
    }
    setup = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    build = _run(*setup, cwd=scratch, **{**variables, "PYTHONPATH": ""})
    assert build.returncode == 0, build.stderr
    runtimes = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    variables["LD_PRELOAD"] = " ".join(runtimes)
    overrun = (
        "from capsops import _cpu; import torch; x = torch.zeros(3)\n"
        "_cpu.squash((x.data_ptr(), 400), (x.data_ptr(), 400), 1, 100, 1, 0, 1)"
    )
    reported = _run(sys.executable, "-c", overrun, cwd=scratch, **variables)
    assert "AddressSanitizer: heap-buffer-overflow" in reported.stderr, reported.stderr[-1000:]
    files = [f"tests/capsops/test_{name}.py" for name in SANITIZED]
    selection = "(cpu or bindings or fuzz) and not low_precision"
    command = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, *files)
    tests = _run(*command, cwd=scratch, **variables)
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-4000:]
    assert re.search(r"^[0-9]{3,} passed", tests.stdout, re.MULTILINE), tests.stdout[-1000:]
