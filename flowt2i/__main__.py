"""`python -m flowt2i` is `flowt2i`."""

import sys

from flowt2i.cli import main

sys.exit(main())
