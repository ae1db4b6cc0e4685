"""Bytes to answers: connections, pool, requests, the control client. Knows nothing of engines."""
