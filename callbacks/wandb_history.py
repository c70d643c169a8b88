"""The history of a run on W&B's server as rows."""

import os

import wandb

from phasewatch.callbacks.sinks.wandb_run import has_key, refuse_foreign_settings
from phasewatch.monitor.errors import PhasewatchError, in_words
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.progress import progress
from phasewatch.monitor.trajectories.rows import MOST_COLUMNS, Row, too_many_columns

SECONDS = 30
"""How long W&B's server may take for one answer; a page of a thousand rows takes one or two."""


def fetch_history(address: str) -> list[Row]:
    """All rows that a run logged, with the numbers in them.

    Args:
        address: `wandb://ENTITY/PROJECT/RUN`, with the run's id, as in the address of its page.

    Returns:
        The rows, with W&B's own count of them in the column `_step`.

    Raises:
        PhasewatchError: if the address is none, there is no key, or the server doesn't answer with a run.
    """
    name = printable(address)
    parts = address.removeprefix("wandb://").strip("/").split("/")
    if len(parts) != 3 or not all(parts):
        raise PhasewatchError(f"{name} names no run; write wandb://ENTITY/PROJECT/RUN, with the run's id.")
    if not has_key():
        raise PhasewatchError(f"{name} needs a key of W&B; run `wandb login`, or set WANDB_API_KEY.")
    refuse_foreign_settings()
    rows: list[Row] = []
    columns: set[str] = set()
    try:
        run = wandb.Api(timeout=SECONDS).run("/".join(parts))
        for number, row in enumerate(progress(run.scan_history(), f"Reading {name}")):
            cells = {key: cell for key, cell in row.items() if isinstance(cell, int | float | str | None)}
            rows.append((f"Row {number} of {name}", cells))
            columns.update(cells)
            if len(columns) > MOST_COLUMNS:
                raise too_many_columns(name, len(columns))
    except PhasewatchError:
        raise
    except Exception as error:
        server = os.environ.get("WANDB_BASE_URL", "W&B's server")
        raise PhasewatchError(
            f"{name} can't be read from {server} ({in_words(error)}); check the address, the key and the network."
        ) from error
    return rows
