"""Linear maps that probes fit."""
