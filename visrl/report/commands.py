"""`visrl report`: the page of a run, from the command line. Heavy things are imported when it runs."""

from __future__ import annotations

from pathlib import Path

import typer


def report(run: Path) -> None:
    """Write the report of a run folder, and say what it was made from and what is not there yet.

    Raises:
        ReportError: no report can be made of it.
        HeldError: another process writes its page.
    """
    from visrl.manifest import hold
    from visrl.report.page import render, save
    from visrl.report.run import load_run

    loaded = load_run(run)
    page = render(loaded)
    with hold(run / "report.html"):  # the page alone: a run may be reported on while it is written
        path = save(run, page)
    typer.echo(
        f"read {run}: {len(loaded.stages)} evaluated checkpoints, {len(loaded.pairs)} iterations of pairs, "
        f"{len(loaded.curves)} training logs, {len(loaded.evaluations)} evaluations, {len(loaded.manifests)} manifests"
    )
    if loaded.missing:
        typer.echo(f"left out, not there yet: {', '.join(loaded.missing)}")
    typer.echo(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
