"""The benchmarks run and report a ratio per comparison; how large it is, is no test's business."""

import json
import subprocess
import sys

from causaldpo_lib.paths import ROOT


def test_training_benchmark_reports_ratios(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "--rows",
        "32",
        "--repeats",
        "1",
        "--output",
        str(tmp_path / "b.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "b.json").read_text())
    assert len(found["ratios"]) == 3 and all(value > 0 for value in found["ratios"].values())
    assert all(name in done.stdout for name in found["ratios"])
