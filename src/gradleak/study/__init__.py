"""Studies: grids of independent runs, resumable, on one machine or a cluster, and a report beside published figures."""
