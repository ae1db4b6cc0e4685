"""Rows in, generations, rows out. Sees a server only through a small protocol."""
