"""Makes `python -m diffagents` equivalent to the command `diffagents`."""

import sys

from diffagents.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
