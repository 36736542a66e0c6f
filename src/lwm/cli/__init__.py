"""Define the command line, one small file per verb."""
