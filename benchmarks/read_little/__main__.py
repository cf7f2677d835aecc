"""What a decoded token costs and loses when it reads a part of the pairs: ``speed`` or ``agreement``.

python -m benchmarks.read_little speed --output FILE.json
python -m benchmarks.read_little agreement --model smollm2 --dataset PG19 --output FILE.json
"""

from __future__ import annotations

import sys

from benchmarks.read_little import agreement, speed


def main() -> int:
    parts = {"speed": speed.main, "agreement": agreement.main}
    if len(sys.argv) < 2 or sys.argv[1] not in parts:
        print(__doc__, file=sys.stderr)
        return 2
    return parts[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
