"""`python -m benchmarks …` is `cmlm-fast bench …`."""

import sys

from cmlm_fast.cli import main

sys.argv.insert(1, "bench")
main()
