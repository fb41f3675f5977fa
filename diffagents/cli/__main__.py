"""`python -m diffagents.cli` is the command `diffagents`, like `python -m diffagents`."""

import sys

from diffagents.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
