"""Experiments of many runs: grids of seeds and settings, hyperparameter search, choosing among policies, joint training."""
