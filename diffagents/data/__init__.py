"""Datasets: reading, checking, caching, collecting, normalising and sampling them; and the replay buffer of online training."""
