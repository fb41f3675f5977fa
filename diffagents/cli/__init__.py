"""The command line: what `diffagents ...` accepts, one module for policies and one for experiments."""
