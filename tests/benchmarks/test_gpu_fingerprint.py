"""The proofs that ship are about the kernels that ship."""

from pathlib import Path

import pytest

from benchmarks.gpu import fingerprint
from capsops.proofs import shipped

LEDGER = Path(__file__).resolve().parents[2] / "benchmarks/results/GPU_LEDGER.md"


@pytest.mark.parametrize("proof", shipped.PROOFS, ids=lambda proof: f"{proof.model} {proof.backend}")
def test_a_proof_is_about_these_sources_and_has_its_row(proof: shipped.Proof) -> None:
    """Where it fails: run benchmarks/gpu/first_contact.sh on such a GPU, or show that the machine code is the
    same (python -m benchmarks.gpu.fingerprint --same), or take the proof out."""
    known = proof.kernels.split()[0]
    assert known == fingerprint.fingerprint(proof.backend)
    rows = LEDGER.read_text().split("\n## What ran\n")[1].splitlines()
    row = next(row for row in rows if known in row)
    assert proof.model in row
    assert proof.commit in row
    assert "0 failed" in row
