"""The algorithms: one paper, one file, with its hyperparameters, losses, stages and the networks that only it uses."""
