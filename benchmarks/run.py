"""`make bench`: every benchmark, or the one named, as ``python -m benchmarks.run training --repeats 1``."""

from __future__ import annotations

import sys
from importlib import import_module

BENCHMARKS = ("training", "data", "ranking", "cost")


def main() -> None:
    """Run the benchmarks; what follows a benchmark's name are its options."""
    name, *options = sys.argv[1:] or ["all"]
    if name not in (*BENCHMARKS, "all"):
        sys.exit(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}, or none for all of them")
    for each in BENCHMARKS if name == "all" else (name,):
        sys.argv = [f"benchmarks.{each}", *options]
        import_module(f"benchmarks.{each}").main()


if __name__ == "__main__":
    main()
