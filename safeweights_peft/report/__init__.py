"""Saved results -> tables, pictures and pages. Reads plain JSON; computes nothing."""

from safeweights_peft.report.page import render_page
from safeweights_peft.report.pictures import plot_pattern, plot_probe, plot_run
from safeweights_peft.report.tables import (
    comparison_rows,
    evaluation_rows,
    judged_rows,
    overlap_rows,
    pattern_rows,
    probe_rows,
    rate_text,
    reproduction_rows,
    size_text,
    verdict_lines,
)

__all__ = [
    "comparison_rows",
    "evaluation_rows",
    "judged_rows",
    "overlap_rows",
    "pattern_rows",
    "plot_pattern",
    "plot_probe",
    "plot_run",
    "probe_rows",
    "rate_text",
    "render_page",
    "reproduction_rows",
    "size_text",
    "verdict_lines",
]
