"""The command line, ``hf-archs``: a file is called as its command. Nothing else imports these."""
