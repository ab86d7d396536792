"""The command line, ``hf-archs``. No other package of the library imports it."""
