"""The commands `vitreg evaluate PROBE`."""
