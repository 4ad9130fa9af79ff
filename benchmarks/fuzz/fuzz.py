"""Coverage-guided fuzzing of everything that reads an adapter, by atheris (libFuzzer for Python).

    pip install atheris
    python benchmarks/fuzz/fuzz.py artifact --seconds 600

Targets: metadata, artifact, streams; see ``targets``. Stops at the first input that raises
anything but ``FormatError``, takes more than 10 seconds or 2 GB, and leaves it in the folder that
``--out`` gives, where the corpus grows as well. The README beside this says what was found.
"""

import argparse
import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["safeweights_peft"]):
    import targets


def main() -> None:
    """Make seeds, then fuzz."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=sorted(targets.TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("fuzz"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # a newer minor version is read with a warning
    corpus = arguments.out / arguments.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(targets.seeds(arguments.target)):
        (corpus / f"seed{number}").write_bytes(seed)
    options = [
        f"-max_total_time={arguments.seconds}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=8192",
        f"-artifact_prefix={corpus.resolve()}-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], targets.TARGETS[arguments.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
