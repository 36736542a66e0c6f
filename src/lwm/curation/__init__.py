"""Make training data from books, documents, images and videos."""
