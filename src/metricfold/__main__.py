"""``python -m metricfold`` is the command ``metricfold``."""

import sys

from metricfold.cli import main

sys.exit(main())
