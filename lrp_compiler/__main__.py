"""``python -m lrp_compiler``: the command line."""

import sys

from lrp_compiler.cli import main

sys.exit(main())
