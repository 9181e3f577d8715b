"""Other libraries at the same work: one file for each, the points they are measured at, the tables."""
