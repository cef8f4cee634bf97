"""`python -m muonlab.cli` is the command `muonlab`."""

import sys

from muonlab.cli import main

sys.exit(main())
