"""`python -m pkjax` is `pkjax`."""

import sys

from pkjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
