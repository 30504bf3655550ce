"""python -m fewlabels, which is also what torchrun starts."""

import sys

from fewlabels.cli import main

sys.exit(main())
