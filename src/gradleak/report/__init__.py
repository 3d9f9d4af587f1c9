"""The report of a run: one self-contained HTML page and a picture of truth above reconstruction."""

from gradleak.report.figures import grid_png
from gradleak.report.html import ReportData, render, write_report

__all__ = ["ReportData", "grid_png", "render", "write_report"]
