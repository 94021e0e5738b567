"""What makes a portable graph fast on one kind of runtime."""
