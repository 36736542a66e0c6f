"""Generate a small world of named things: captioned images, videos, questions and stories."""
