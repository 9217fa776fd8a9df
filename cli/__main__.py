"""`python -m mien.cli`."""

import sys

from . import main

sys.exit(main())
