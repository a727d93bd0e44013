"""How fast the command line answers: seconds of `steer2edit --help`, the median of several.

Run: python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from timing import report, seconds


def main() -> None:
    command = [str(Path(sys.executable).with_name("steer2edit")), "--help"]
    times = [seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(11)]
    report("seconds of steer2edit --help", statistics.median(times), ("<=", 0.3), f"slowest {max(times):.3f}")


if __name__ == "__main__":
    main()
