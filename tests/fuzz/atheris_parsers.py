"""Coverage-guided fuzzing of the parsers of bytes with atheris, where it is installed (``pip install atheris``).

python tests/fuzz/atheris_parsers.py observation -runs=100000

The first argument names a target of :mod:`fuzz.targets`; the others are libFuzzer's. A crash ends it, and leaves the input
in the working folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

# the format readers of our own; torch and numpy would be slow, and are not what is tested
with atheris.instrument_imports(include=["gradleak.tensors", "gradleak.files", "gradleak.observation", "gradleak.spec"]):
    from fuzz import targets


def main() -> None:
    """Fuzz one target from the good files as a first corpus."""
    name, *options = sys.argv[1:] or [""]
    if name not in targets.seeds():
        raise SystemExit(f"usage: {sys.argv[0]} TARGET [libFuzzer options]; targets: {', '.join(targets.seeds())}")
    corpus = Path(tempfile.mkdtemp(prefix="gradleak-corpus-"))
    for number, content in enumerate(targets.seeds()[name]):
        (corpus / str(number)).write_bytes(content)
    atheris.Setup([sys.argv[0], "-max_len=8192", *options, str(corpus)], targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
