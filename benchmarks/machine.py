"""Where a benchmark's figures go: JSON, with what made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bert.provenance import provenance


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON, with the command (paths by their last part), machine, versions and date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **figures}, indent=2) + "\n", encoding="utf-8")
