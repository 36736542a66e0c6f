"""The command line: one small file a verb. Answers go to standard output and nothing else does."""
