"""What a short spin costs and saves: the time of one decoding workload, alone and beside a busy process.

OpenMP's threads spin while they wait for each other. On a machine whose cores are taken by others, a spinning thread
holds the core that the slow one needs; threads that go to sleep at once take long to wake. `steer2edit` lets them spin
briefly, unless the user has set OMP_WAIT_POLICY. Each time is that of a process of its own, and the settings take
turns, so that a drift of the machine falls on all of them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from steer2edit.cli import SPIN_COUNT

ROUNDS = 5
WORK = """
import time, torch
torch.manual_seed(0)
weights = [torch.randn(576, 1536) for _ in range(60)]
x = torch.randn(16, 576)
for w in weights: x @ w
start = time.perf_counter()
for _ in range(60):
    for w in weights:
        torch.nn.functional.silu(x @ w) @ w.T
print(time.perf_counter() - start)
"""
SETTINGS = {
    "spinning": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "short spin": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPIN_COUNT},  # what the command line sets
}
SPIN = "import torch\nx = torch.randn(512, 512)\nwhile True: x @ x"


def seconds(setting: dict[str, str]) -> float:
    unset = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", WORK], env={**unset, **setting}, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def measure(busy: bool) -> dict[str, float]:
    """Median seconds under each setting."""
    other = subprocess.Popen([sys.executable, "-c", SPIN]) if busy else None
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    try:
        for _ in range(ROUNDS):
            for name, row in times.items():
                row.append(seconds(SETTINGS[name]))
    finally:
        if other is not None:
            other.kill()
    return {name: statistics.median(row) for name, row in times.items()}


def main() -> None:
    for busy in (False, True):
        times = measure(busy)
        seconds_of_each = ", ".join(f"{name} {time:.2f} s" for name, time in times.items())
        ratio = times["spinning"] / times["short spin"]
        where = "beside a busy process" if busy else "alone"
        print(f"{where}: {seconds_of_each}; spinning / short spin {ratio:.2f}")


if __name__ == "__main__":
    main()
