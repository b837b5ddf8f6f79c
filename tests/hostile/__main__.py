"""Judge all hostile networks: `PYTHONPATH=.:tests python -m hostile [part of a name]`."""

from __future__ import annotations

import sys
import time
from collections import Counter

import torch

from hostile import HOSTILE, Finding, Hostile, judge
from hostile.judge import VERDICTS


def guarded(case: Hostile) -> Finding:
    """What is found, or that the network itself is broken."""
    try:
        return judge(case)
    except Exception as error:
        return Finding("broken", f"{type(error).__name__}: {error}")


def main() -> None:
    torch.set_num_threads(1)
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    start, counts, shrunk = time.perf_counter(), Counter[tuple[str, str]](), Counter[str]()
    for case in HOSTILE.values():
        if part not in case.name:
            continue
        began = time.perf_counter()
        found = guarded(case)
        counts[case.kind, found.verdict] += 1
        shrunk[case.kind] += found.shrunk and found.verdict == "exact"
        unwanted = found.verdict == "refused" and case.wanted == "exact"
        if unwanted or part or found.verdict not in ("exact", "refused"):
            text = " ".join(str(found).split())[:300]
            sys.stdout.write(f"{case.name} ({time.perf_counter() - began:.1f} s, wanted {case.wanted}): {text}\n")
            sys.stdout.flush()
    names = (*VERDICTS, "broken")
    kinds = sorted({kind for kind, _ in counts})
    sys.stdout.write(f"\n{'':12}" + "".join(f"{name:>9}" for name in (*names, "all", "shrunk")) + "\n")
    for kind in (*kinds, "all"):
        row = [sum(n for (k, v), n in counts.items() if v == name and kind in (k, "all")) for name in names]
        smaller = sum(n for k, n in shrunk.items() if kind in (k, "all"))
        sys.stdout.write(f"{kind:12}" + "".join(f"{n:>9}" for n in (*row, sum(row), smaller)) + "\n")
    sys.stdout.write(f"{time.perf_counter() - start:.0f} s\n")


if __name__ == "__main__":
    main()
