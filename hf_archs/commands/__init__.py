"""The command line, ``hf-archs``: each command has a module of its name. Nothing outside this package imports them."""
