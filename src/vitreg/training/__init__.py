"""THE CAUSE: training with and without registers, and watching artifacts appear."""
