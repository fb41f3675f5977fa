"""Descriptions of hyperparameters that many algorithms share: those of the fast recipe, and `deterministic`.

The recipe is the block `fast` of zoo/<algorithm>.yml, one setting for all datasets. In a plain `Config` each piece of it is
off, so that `preset=None` and `preset="paper"` are the paper's algorithm.
"""

COSINE = "Whether learning rates fall to 0 on a cosine over the stage."
DETERMINISTIC = "Whether `predict` and `evaluate` act without randomness unless the call says otherwise."
DETERMINISTIC_BACKUP = "Whether the targets of Q take the policy's action without noise, the one that acts, not its samples."
PRECONDITION = "Whether noise is predicted as a correction to that of a Gaussian around a clone, which is trained with it."
Q_LAYER_NORM = "Whether Q has LayerNorm in its hidden layers."
Q_NORM = (
    'Unit of Q in the policy\'s loss: "value" divides by the mean size of Q; "spread" steps along dQ/da in units of the '
    "spread of the data's actions, which depend neither on the scale of rewards nor on how narrow the data are."
)
Q_NORMS = ("value", "spread")
RETURN_TEMPERATURE = (
    "Temperature of return-weighted sampling: small prefers episodes with high returns (0.1: the best over the worst by "
    "e^10). None: all transitions are drawn equally often."
)
RETURNS_SHARE = "Share of the stage, at its beginning, in which Q regresses on the returns of the data instead of TD targets."
