"""``python -m dmir`` is ``dmir``."""

import sys

from dmir.cli import main

sys.exit(main())
