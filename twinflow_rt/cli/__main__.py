"""`python -m twinflow_rt.cli`."""

import sys

from . import main

sys.exit(main())
