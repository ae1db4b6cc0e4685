"""How a run is shown: progress and summaries."""
