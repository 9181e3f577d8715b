"""metricfold inside trainers and data libraries: one module for each, imported by its user."""
