"""The command line. Nothing here imports a framework; commands load what they need when they run."""
