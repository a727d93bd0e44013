"""What waiting passively costs and saves: the time of one decoding workload, alone and beside a busy process.

OpenMP's threads spin while they wait for each other. On a machine whose cores are taken by others, a spinning thread
holds the core that the slow one needs. `steer2edit` sets OMP_WAIT_POLICY=PASSIVE unless the user has set it. Each time
is that of a process of its own, started in turn, so that a drift of the machine falls on both.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

ROUNDS = 3
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
SPIN = "import torch\nx = torch.randn(512, 512)\nwhile True: x @ x"


def seconds(policy: str) -> float:
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
    done = subprocess.run([sys.executable, "-c", WORK], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(busy: bool) -> dict[str, float]:
    """Median seconds under each policy."""
    other = subprocess.Popen([sys.executable, "-c", SPIN]) if busy else None
    times: dict[str, list[float]] = {"ACTIVE": [], "PASSIVE": []}
    try:
        for _ in range(ROUNDS):
            for policy, row in times.items():
                row.append(seconds(policy))
    finally:
        if other is not None:
            other.kill()
    return {policy: statistics.median(row) for policy, row in times.items()}


def main() -> None:
    for busy in (False, True):
        times = measure(busy)
        ratio = times["ACTIVE"] / times["PASSIVE"]
        where = "beside a busy process" if busy else "alone"
        print(f"{where}: spinning {times['ACTIVE']:.2f} s, passive {times['PASSIVE']:.2f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
