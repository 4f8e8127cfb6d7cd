"""Memory management policy: address spaces, notifiers, residency. Knows no system call."""
