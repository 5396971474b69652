"""Coverage-guided fuzzing with atheris, which is no dependency of the project (Linux, `pip install atheris`):

    python -m tests.fuzz.run tensors -max_total_time=600

from the repository's root. The first argument is a target (`targets.TARGETS`), the others are libFuzzer's. New inputs
go to a folder that is thrown away; an input that breaks a target is written to the working folder as crash-*. Fix what
it shows, then add it to seeds/: `test_replay.py` runs those in every test run.
"""

from __future__ import annotations

import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["twinflow_rt"]):
    from tests.fuzz.targets import SEEDS, TARGETS, Runner

from tests.fuzz.mutate import mutated


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz.run {'|'.join(TARGETS)} [libFuzzer options]")
    name, options = sys.argv[1], sys.argv[2:]
    run = Runner(name)

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        """Half libFuzzer's own damages, half ours, which keep JSON and header lengths whole."""
        return (atheris.Mutate(data, most) if seed % 2 else mutated(data, seed))[:most]

    with tempfile.TemporaryDirectory() as found:
        argv = [sys.argv[0], "-max_len=65536", *options, found, str(SEEDS / name)]
        atheris.Setup(argv, lambda data: run(data) and None, custom_mutator=mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
