"""Research on maps and runs: probe, report, compare and reproduce, with their pictures."""
