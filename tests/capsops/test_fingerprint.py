"""What counts as a change of kernels, and where their fingerprints can be computed."""

import shutil
import subprocess
import sys
from pathlib import Path

from capsops.backends import fingerprint

ROOT = Path(__file__).resolve().parents[2]


def test_comments_and_white_space_do_not_count() -> None:
    assert fingerprint.cpp_code('int a; // one\n/* two */ char* b = "// c";') == fingerprint.cpp_code(
        'int a;\nchar*  b = "// c";'
    )
    assert fingerprint.cpp_code("int a = 1;") != fingerprint.cpp_code("int a = 2;")


def test_docstrings_do_not_count() -> None:
    plain = "def f(x):\n    return x + 1\n"
    documented = '"""A module."""\n\ndef f(x):  # adds\n    """Adds one."""\n    return (x + 1)\n'
    assert fingerprint.python_code(plain) == fingerprint.python_code(documented)
    assert fingerprint.python_code(plain) != fingerprint.python_code(plain.replace("1", "2"))


def test_flags_of_nvcc_count_and_other_lines_of_setup_do_not(tmp_path: Path) -> None:
    for folder in ("csrc/cuda", "csrc/common"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    ours = fingerprint.cuda(ROOT)
    (tmp_path / "setup.py").write_text(f"{setup}# another line\n", encoding="utf-8")
    assert fingerprint.cuda(tmp_path) == ours
    (tmp_path / "setup.py").write_text(setup.replace('CUDA_FLAGS = ("-O3"', 'CUDA_FLAGS = ("-O2"'), "utf-8")
    assert fingerprint.cuda(tmp_path) != ours


def test_triton_kernels_have_one_fingerprint_wherever_they_are(tmp_path: Path) -> None:
    kernels = ROOT / "capsops/backends/triton"
    shutil.copytree(kernels, tmp_path / "kernels")
    (tmp_path / "kernels/__init__.py").write_text("")
    assert fingerprint.triton(tmp_path / "kernels") == fingerprint.triton(kernels)
    with (tmp_path / "kernels/squash.py").open("a") as file:
        file.write("\n\nONE = 1\n")
    assert fingerprint.triton(tmp_path / "kernels") != fingerprint.triton(kernels)


def test_the_build_needs_no_torch_for_it() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fingerprint, pathlib;"
        "assert not {'torch', 'capsops', 'numpy'} & {*sys.modules};"
        "print(fingerprint.cuda(pathlib.Path(sys.argv[2])))"
    )
    command = [sys.executable, "-S", "-c", code, ROOT / "capsops/backends", ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == fingerprint.cuda(ROOT), done.stderr
