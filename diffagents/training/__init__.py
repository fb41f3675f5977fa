"""Training: the loop over updates, offline and online, with its state, callbacks, monitoring and compiled updates."""
