"""Hold the recipes, one function each."""
