"""Environments: how they are made from an id or a stored spec, and how they become vectorised environments of SB3."""
