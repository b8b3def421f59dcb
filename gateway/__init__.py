"""The HTTP side: authenticates, validates, accepts, answers."""
