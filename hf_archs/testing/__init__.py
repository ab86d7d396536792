"""Helpers for the tests of plugins: the contract of an architecture, and checks of ops and formats."""
