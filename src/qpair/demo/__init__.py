"""What `make demo` and `make demo-vm` show: the stack from a user's side, by the commands a user would type."""
