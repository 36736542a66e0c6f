"""Define the evaluation tasks: what each asks and how it judges an answer."""
