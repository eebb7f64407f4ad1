"""Every benchmark, one after the other: `python -m benchmarks` prints every figure of docs/benchmarks.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SHARED = ("__init__", "__main__", "machine", "measure", "cases")


def main() -> int:
    """Run each script of this folder in a process of its own; 1 if one failed."""
    failed = []
    for script in sorted(path for path in FOLDER.glob("*.py") if path.stem not in SHARED):
        print(f"\n$ python -m benchmarks.{script.stem}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{script.stem}"], cwd=FOLDER.parent).returncode:
            failed.append(script.stem)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
