"""Process life: the stack, its reactors, the order of its subsystems, its configuration file and its signals."""
