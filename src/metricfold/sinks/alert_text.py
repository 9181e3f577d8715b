"""What trackers say of an alert."""

from __future__ import annotations

from typing import Any

from metricfold.sinks.record import Record

__all__ = ["key_of", "text_of", "title_of"]


def key_of(alert: dict[str, Any], record: Record) -> str:
    """Return the name of the newest alert about the same, such as ``alert.train.alpaca/loss``."""
    about = "/".join(alert[part] for part in ("dataset", "name") if part in alert)
    return ".".join(filter(None, ("alert", record.prefix, about or alert["rule"])))


def title_of(alert: dict[str, Any], record: Record) -> str:
    """Return a headline, such as ``train loss of alpaca: severe``."""
    of = f" of {alert['dataset']}" if "dataset" in alert else ""
    about = f"{alert['name']}{of}" if "name" in alert else alert["rule"]
    return f"{record.prefix} {about}: {alert['severity']}".strip()


def text_of(alert: dict[str, Any], record: Record) -> str:
    """Return what was found, and at which step."""
    return f"step {alert.get('step', record.step)}: {alert['message']}"
