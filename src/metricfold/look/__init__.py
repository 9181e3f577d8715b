"""Look at what was written: read run files, show them, compare them, hand them on.

    from metricfold import look

    run = look.read("runs/1")
    loss = run.columns[look.Key("train", "web", "loss")]
    loss.steps, loss.values

Nothing of torch or JAX is imported, and a run may still be going on while it is read.
"""

from metricfold._core.runtime.published import publish
from metricfold.look.place import LookError, find
from metricfold.look.reading import Arrays, Column, Histograms, Key, RunFile, Update, read
from metricfold.look.report import report
from metricfold.look.view import View, view

__all__ = [
    "Arrays",
    "Column",
    "Histograms",
    "Key",
    "LookError",
    "RunFile",
    "Update",
    "View",
    "find",
    "read",
    "report",
    "view",
]
publish(globals())
