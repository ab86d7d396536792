"""The contract of an architecture, and the checks of ops and formats, for the tests of a plugin."""
