"""`python -m vitreg`, and `torchrun -m vitreg` for training on several processes."""

from vitreg.cli import main

main()
