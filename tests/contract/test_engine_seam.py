"""Outside its harness, neuron does not know vLLM: another engine is another package beside it."""

from __future__ import annotations

from tests.contract.documents import TOP

HARNESS = ("neuron/harness/vllm/", "neuron/sim/")
"""vLLM's harness, and the program that imitates vLLM."""
ALLOWED = {
    "neuron/config/harness.py": "the descriptions of its keys, for the reference",
    "neuron/config/tables.py": "the descriptions of its keys, for the reference",
    "neuron/config/settings.py": "the default of `harnesses`",
    "neuron/harness/registry.py": "the line that registers it",
    "neuron/harness/sim.py": "the harness of the imitation",
}


def test_only_its_harness_knows_vllm() -> None:
    """vLLM's name occurs only in its harness, in code and comments: a rule that needs it to be explained belongs
    there."""
    found = {
        name
        for path in (TOP / "neuron").rglob("*.py")
        if not (name := str(path.relative_to(TOP))).startswith(HARNESS)
        and "vllm" in path.read_text(encoding="utf-8").lower()
    }
    assert found == set(ALLOWED)
