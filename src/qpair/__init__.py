"""qpair: a user-space storage stack. Python decides, Rust moves."""
