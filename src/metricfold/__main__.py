"""``python -m metricfold`` is the command ``metricfold``."""

import sys

from metricfold.cli import main

if __name__ == "__main__":
    sys.exit(main())
