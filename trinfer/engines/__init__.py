"""One file per engine: command line, environment, quirks."""
