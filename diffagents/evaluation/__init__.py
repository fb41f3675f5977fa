"""Measuring a policy in an environment: whole episodes, confidence intervals, D4RL scores and videos.

Any object with SB3's `predict` will do, not only our agents.
"""
