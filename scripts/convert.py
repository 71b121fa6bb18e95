"""``bridge convert`` from a checkout: ``python scripts/convert.py SOURCE… -o DIR``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bridge.cli import convert_main

if __name__ == "__main__":
    sys.exit(convert_main())
