"""Look at what was written: read run files, show them, compare them, hand them on.

    from metricfold import look

    run = look.read("runs/1")
    loss = run.columns[look.Key("train", "web", "loss")]
    loss.steps, loss.values

Nothing of torch or JAX is imported, and a run may still be going on while it is read.
"""

from metricfold._core.runtime.published import publish
from metricfold.look.comparing import Comparison, Row, compare
from metricfold.look.exporting import export, read_frame, read_table
from metricfold.look.place import LookError, find
from metricfold.look.reading import Arrays, Column, Histograms, Key, RunFile, Update, read
from metricfold.look.report import report
from metricfold.look.showing import show
from metricfold.look.tailing import tail
from metricfold.look.view import View, view

__all__ = [
    "Arrays",
    "Column",
    "Comparison",
    "Histograms",
    "Key",
    "LookError",
    "Row",
    "RunFile",
    "Update",
    "View",
    "compare",
    "export",
    "find",
    "read",
    "read_frame",
    "read_table",
    "report",
    "show",
    "tail",
    "view",
]
publish(globals())
