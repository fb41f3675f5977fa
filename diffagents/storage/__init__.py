"""Agents as files: saved folders and archives, checkpoints of training, model cards, the Hub, and the authors' checkpoints."""
