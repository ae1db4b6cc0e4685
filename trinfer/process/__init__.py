"""Trees of processes: guard, spawn, output, ports and sockets. Knows nothing of inference."""
