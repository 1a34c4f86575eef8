"""`python -m cxr_dist` is `cxr-dist`."""

from cxr_dist.cli import main

main()
