"""One process takes the place of another while front ends go on: ``qpair serve --takeover``."""
