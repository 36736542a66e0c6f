"""Read and write images and videos as arrays of pixels."""
