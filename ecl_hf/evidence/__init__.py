"""What a model and a run folder show: predictions, metrics, the arrays behind the figures, tables, plots.

Knows models and files, not how a model was trained.
"""
