"""Read records from files in many formats, by index."""
