"""A W&B workspace with the losses of all datasets in one chart, for runs that `WandbSink` has logged.

    pip install wandb-workspaces
    python examples/wandb_workspace.py ENTITY PROJECT

It asks W&B's server, so it needs a login, and runs that have been uploaded.
"""

import sys

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as ws

entity, project = sys.argv[1:]
sections = [
    ws.Section(
        name=prefix,
        is_open=True,
        panels=[
            panels.LinePlot(
                title="loss of every dataset",
                x=f"{prefix}/step",
                metric_regex=rf"^{prefix}(_.+)?/loss$",
            ),
            panels.LinePlot(
                title="tokens of every dataset",
                x=f"{prefix}/step",
                metric_regex=rf"^{prefix}(_.+)?/tokens_seen$",
            ),
        ],
    )
    for prefix in ("train", "val")
]
print(ws.Workspace(entity=entity, project=project, sections=sections).save())
