"""The report of a run: one self-contained HTML page and a picture of truth above reconstruction."""

from gradleak.report.figures import grid_png
from gradleak.report.html import ReportData, render, write_report
from gradleak.report.matrix import MatrixData, render_matrix

__all__ = ["MatrixData", "ReportData", "grid_png", "render", "render_matrix", "write_report"]
