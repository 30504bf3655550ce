"""All classes of faults, one after another, and one table: `python tests/faults [--kills 100] [--json FILE]`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults.tally import parser

CLASSES = ("storage", "damage", "payloads", "names", "mistakes", "awful", "signals", "nonfinite", "ranks")


def main() -> int:
    """Run them; 1 if a fault of any class was not survived."""
    asker = parser(__doc__)
    asker.add_argument("--kills", type=int, default=100)
    asked = asker.parse_args()
    # 50 faults of ranks, and 4 under torchrun, take six minutes more
    more = {"kills": ("--kills", str(asked.kills)), "ranks": ("--faults", "12", "--under-torchrun", "2")}
    rows, failed = [], []
    with tempfile.TemporaryDirectory(prefix="fewlabels-faults-") as folder:
        for name in (*CLASSES, "kills"):
            tally = Path(folder) / f"{name}.json"
            words = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--json", str(tally)]
            words += ["--seed", str(asked.seed), *more.get(name, ())]
            if subprocess.run(words, check=False).returncode:
                failed.append(name)
            rows += json.loads(tally.read_text()) if tally.exists() else []
    if asked.json:
        asked.json.write_text(json.dumps({"seed": asked.seed, "classes": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{'faults (seed ' + str(asked.seed) + ')':<52} {'injected':>8} {'survived':>8} {'seconds':>8}")
    for row in rows:
        print(
            f"{row['name']:<52} " + (row["skipped"] or f"{row['injected']:8,} {row['survived']:8,} {row['seconds']:8,}")
        )
    injected, survived = (sum(row[key] for row in rows) for key in ("injected", "survived"))
    print(f"{'all':<52} {injected:8,} {survived:8,}" + (f"   failed: {', '.join(failed)}" if failed else ""))
    for row in rows:  # once more, last and short: CI may show the end alone
        for words in row["failures"]:
            print(
                f"{row['name']}: NOT survived: " + (words if len(words) < 700 else f"{words[:200]} ... {words[-500:]}")
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
