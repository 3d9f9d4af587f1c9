"""The generated part of ``docs/reproduction.md``, from ``studies/results/rows.json``.

    gradleak study report --out RUNS --to RUNS --rows studies/results/rows.json    # finished cells become rows
    python tools/reproduction.py --cells RUNS/cells                                # pictures, where run folders are at hand

What stands above the mark in the page is written by hand and kept.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gradleak.study import store
from gradleak.study.report import write_report
from gradleak.study.spec import all_cells, load_studies

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
ROWS = ROOT / "studies" / "results" / "rows.json"
MARK = "<!-- from here on written by tools/reproduction.py from studies/results/rows.json -->"


def page(figures: Path, *, run_folders: Path | None = None) -> str:
    """The whole page; curves and pictures go to ``figures/figures``."""
    rows = store.read_rows(ROWS)
    begun = {(row["study"], row["size"]) for row in rows}
    everything = load_studies([ROOT / "studies" / "small", ROOT / "studies" / "full"])
    studies = [study for study in everything if (study.name, study.size) in begun]
    there = {(row["study"], row["size"], row["cell"]): row for row in rows}
    nowhere = Path(tempfile.gettempdir()) / "gradleak-no-such-folder"
    current = {(cell.study, cell.size, cell.key): cell for cell in all_cells(studies)}
    rows = [there.get(key) or store.row(cell, nowhere) for key, cell in current.items()]
    if run_folders is not None:
        write_report(studies, rows, figures, cells=run_folders, pictures="thumbnails")
    shown = write_report(studies, rows, figures, pictures="thumbnails")  # without links to this machine's folders
    if run_folders is not None:  # pictures of runs made on another machine stay
        for old in set((figures / "figures").iterdir()) - set(shown):
            old.unlink()
    generated = (figures / "report.md").read_text(encoding="utf-8").partition("\n")[2]
    generated = generated.replace("(figures/", "(reproduction/figures/")
    for name in ("report.md", "report.html"):
        (figures / name).unlink()
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0].rstrip()
    lowered = generated.rstrip().replace("\n## ", "\n### ")
    return f"{by_hand}\n\n{MARK}\n\n## Measured by the studies\n{lowered}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, help="run folders, for pictures")
    options = parser.parse_args()
    PAGE.write_text(page(ROOT / "docs" / "reproduction", run_folders=options.cells), encoding="utf-8")


if __name__ == "__main__":
    main()
