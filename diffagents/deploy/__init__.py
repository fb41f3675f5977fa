"""Trained policies outside training: acting with NumPy alone or with compiled code, and export to other runtimes."""
