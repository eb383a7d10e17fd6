"""`python -m data_gen …` is `data-gen …`."""

import sys

from data_gen.cli import main

sys.exit(main())
