"""Runs every benchmark, one after the other, each in a process of its own.

Run: make bench
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "startup.py",
    "busy.py",
    "scoring.py",
    "probe.py",
    "mixed_batch.py",
    "study.py",
    "slots.py",
    "serve.py",
    "chat.py",
    "export.py",
    "huge.py",
    "few_bits.py",
    "tpe.py",
    "paper_cost.py",
)

if __name__ == "__main__":
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, str(HERE / script)], check=True)
