"""Block devices: what a user configures, opens, measures, and writes in Python."""
