"""The settings of an agent: hyperparameters, the checks of their values, and the presets that reproduce published runs."""
