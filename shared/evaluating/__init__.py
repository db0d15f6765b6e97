"""How good a model is on rows held out: its loss, its answers, and what these decide."""
